# SPDX-License-Identifier: Apache-2.0
"""Which batch sizes get a captured graph, and which one a batch is padded to.

Pure integers: no tensors, no device.  The graph runner asks; tests are tables.
"""

from __future__ import annotations

__all__ = [
    "MemoryClass",
    "capture_sizes",
    "compile_sizes",
    "first_sizes",
    "memory_class",
    "pad_to",
    "padded_seq_lens_sum",
]

from bisect import bisect_left
from typing import TYPE_CHECKING, Literal

from bedplate.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MemoryClass = Literal["standard", "large", "largest"]

_MIB = 1 << 20


def capture_sizes(
    pool_size: int,
    *,
    sizes: Sequence[int] | None = None,
    limit: int | None = None,
    memory: MemoryClass = "standard",
    padding: bool = True,
    speculative: bool = False,
    overlap: bool = False,
    gather_tp_size: int = 1,
) -> tuple[int, ...]:
    """Batch sizes to capture, ascending and unique.

    The largest batch that can occur is always among them: the smaller of ``pool_size`` and
    ``limit``, rounded down to the alignment, as far as the list reaches or a limit asks.
    (Other engines step towards a limit by 16 and stop short of it, so that the batches just
    below it run without a graph.)

    Args:
        pool_size: Most requests that can run at once.
        sizes: The user's own list, copied; ``None`` for a default by ``memory``.
        limit: Largest size wanted; also extends a list that ends below it, by steps of 16.
        memory: How much the device has; see ``memory_class``.
        padding: Batches may be padded, so that few sizes do for all.
        speculative: Each request has several tokens, so large sizes are dearer.
        overlap: Batches are cut in two; sizes must be even.
        gather_tp_size: Ranks among which rows are split; sizes must be multiples.

    Raises:
        ConfigError: A given size is below 1, or none is left.
    """
    _check_given(sizes, limit)
    base = _default_sizes(memory, padding, speculative) if sizes is None else tuple(sizes)
    step = gather_tp_size * (2 if overlap else 1)
    bound = pool_size if limit is None else min(pool_size, limit)
    wanted = {*base, *_reaching(base, limit)}
    if limit is not None or max(wanted) >= bound:
        wanted.add(bound // step * step)
    kept = tuple(sorted(s for s in wanted if 0 < s <= bound and s % step == 0))
    if not kept:
        raise ConfigError(
            f"No batch size is left to capture: of {len(base)} sizes from {min(base)} to "
            f"{max(base)}, none is a multiple of {step} (ranks that split rows, times 2 with "
            f"overlap) and at most {bound} (the smaller of {pool_size} request rows and the "
            f"limit {limit}). Raise the limit or the request rows to at least {step}, list a "
            "multiple of it, or turn graphs off",
            sizes=base,
            alignment=step,
            bound=bound,
        )
    return kept


def compile_sizes(sizes: Iterable[int], *, limit: int = 32) -> tuple[int, ...]:
    """Captured sizes that are small enough to be worth compiling one by one."""
    return tuple(size for size in sizes if size <= limit)


def first_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes to capture before serving: powers of two, and the largest.

    Any batch is then padded to less than twice its size; the others can wait.
    """
    return tuple(size for size in sizes if size & (size - 1) == 0 or size == sizes[-1])


def memory_class(total_bytes: int) -> MemoryClass:
    """Class of a device by its memory: more of it, more and larger graphs."""
    if total_bytes > 160 * 1000 * _MIB:
        return "largest"
    return "large" if total_bytes > 90 * 1024 * _MIB else "standard"


def pad_to(batch_size: int, sizes: Sequence[int]) -> int | None:
    """Smallest captured size that holds ``batch_size``; ``None`` if there is none."""
    index = bisect_left(sizes, batch_size)
    return sizes[index] if index < len(sizes) else None


def padded_seq_lens_sum(
    seq_lens_sum: int, *, batch_size: int, padded_batch_size: int, fill_value: int
) -> int:
    """Sum of lengths once padding rows have the attention's fill length."""
    return seq_lens_sum + (padded_batch_size - batch_size) * fill_value


def _default_sizes(memory: MemoryClass, padding: bool, speculative: bool) -> tuple[int, ...]:
    if speculative:
        sizes = [*range(1, 9), *range(10, 33, 2), *range(40, 57, 8), *range(80, 161, 16)]
    elif padding:
        sizes = [1, 2, 4, *range(8, 161, 8)]
    else:
        sizes = [*range(1, 33), *range(48, 161, 16)]
    if memory != "standard":
        sizes += range(168, 257, 8)
    if memory == "largest":
        sizes += range(272, 513, 16)
    return tuple(sizes)


def _reaching(base: Sequence[int], limit: int | None) -> range:
    """Sizes between the largest of ``base`` that the limit allows and the limit."""
    if limit is None:
        return range(0)
    return range(max((size for size in base if size <= limit), default=limit), limit + 1, 16)


def _check_given(sizes: Sequence[int] | None, limit: int | None) -> None:
    given = [*(sizes or ()), *([] if limit is None else [limit])]
    if (sizes is not None and not sizes) or min(given, default=1) < 1:
        raise ConfigError(
            f"Graph sizes are {list(sizes or ())} with limit {limit}; each must be at least 1, "
            "and a list must not be empty. Leave both out for the default",
            sizes=tuple(sizes or ()),
            limit=limit,
        )
