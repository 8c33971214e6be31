# SPDX-License-Identifier: Apache-2.0
"""What slots cost on the host: ``python -m benchmarks.cases.allocator`` prints a table.

Each case is one act that leaves the allocator as it found it, so that it can be repeated.
"fresh" pools hand out ascending pages; "scattered" ones random pages, the worst case for the
memory they are looked up in.  Minimum and median over the repetitions, per act, in processor
time: what other processes take does not count, though they do slow the caches down.
"""

from __future__ import annotations

__all__ = ["Case", "Timing", "cases", "main", "measure"]

from dataclasses import dataclass
from functools import partial
from statistics import median
from time import process_time
from timeit import timeit
from typing import TYPE_CHECKING

import numpy as np

from bedplate.memory.allocator import PagedAllocator
from bedplate.memory.req_to_token import ReqToTokenPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bedplate.memory.free_list import Int32Array

POOL_TOKENS = 1_000_000
PAGE_SIZES = (1, 16)
REPETITIONS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One act and how often to time it at once; ``bar_us`` is what issue 2 allows."""

    name: str
    act: Callable[[], object]
    number: int
    reset: Callable[[], object] | None = None
    bar_us: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Microseconds per act."""

    case: Case
    minimum_us: float
    median_us: float


def cases() -> Iterator[Case]:
    """Every case, for every page size and order of the free list."""
    for page_size in PAGE_SIZES:
        for scattered in (False, True):
            yield from _allocator_cases(page_size, scattered=scattered)
        yield from _request_cases(page_size)
    rows = ReqToTokenPool(4096, 1)
    yield Case(
        name="request rows: alloc + free 32",
        number=5000,
        act=lambda: rows.free(_given(rows.alloc(32))),
    )


def measure(case: Case, repetitions: int = REPETITIONS) -> Timing:
    """Time one case, after one warm-up."""
    times = []
    for _ in range(repetitions + 1):
        seconds = timeit(case.act, timer=process_time, number=case.number)
        times.append(seconds / case.number * 1e6)
        if case.reset is not None:
            case.reset()
    return Timing(case=case, minimum_us=min(times[1:]), median_us=median(times[1:]))


def main() -> None:
    """Print the table."""
    print(f"pool of {POOL_TOKENS:,} tokens; {REPETITIONS} repetitions; us per act")
    print(f"{'case':58} {'min':>9} {'median':>9} {'bar':>6}")
    for case in cases():
        timing = measure(case)
        bar = "" if case.bar_us is None else f"{case.bar_us:g}"
        print(f"{case.name:58} {timing.minimum_us:9.2f} {timing.median_us:9.2f} {bar:>6}")


def _allocator_cases(page_size: int, *, scattered: bool) -> Iterator[Case]:
    allocator = PagedAllocator(POOL_TOKENS, page_size)
    if scattered:
        pages = _given(allocator.alloc_pages(allocator.available_pages()))
        allocator.free_pages(np.random.default_rng(0).permutation(pages))
    where = f"page {page_size}, {'scattered' if scattered else 'fresh'}"
    yield Case(
        name=f"{where}: alloc_pages + free_pages, 64 pages",
        number=5000,
        bar_us=5,
        act=lambda: allocator.free_pages(_given(allocator.alloc_pages(64))),
    )
    for num_tokens, number, bar_us in ((1024, 2000, None), (POOL_TOKENS, 4, 2000)):
        yield Case(
            name=f"{where}: alloc + free, {num_tokens:,} tokens",
            number=number,
            bar_us=bar_us,
            act=partial(_alloc_and_free, allocator, num_tokens),
        )


def _request_cases(page_size: int) -> Iterator[Case]:
    """Requests of 100, 101, … tokens: their prompts, then one more token each."""
    for batch_size in (1, 32, 256):
        allocator = PagedAllocator(POOL_TOKENS, page_size)
        lens = np.arange(100, 100 + batch_size, dtype=np.int32)
        none = np.zeros_like(lens)
        slots = _given(allocator.alloc_extend(none, lens, none - 1))
        last = slots[np.cumsum(lens) - 1]
        restore = partial(allocator.restore_state, allocator.backup_state())
        yield Case(
            name=f"page {page_size}: alloc_extend, {batch_size} prompts",
            number=10,
            act=partial(allocator.alloc_extend, none, lens, none - 1),
            reset=restore,
        )
        yield Case(
            name=f"page {page_size}: alloc_decode, {batch_size} requests",
            number=500,
            act=partial(allocator.alloc_decode, lens + 1, last),
            reset=restore,
        )


def _alloc_and_free(allocator: PagedAllocator, num_tokens: int) -> None:
    allocator.free(_given(allocator.alloc(num_tokens)))


def _given(slots: Int32Array | None) -> Int32Array:
    if slots is None:
        raise ValueError("the pool is too small for this case; raise POOL_TOKENS")
    return slots


if __name__ == "__main__":
    main()
