# SPDX-License-Identifier: Apache-2.0
"""L4: slots and the storage behind them, of the backend or of the core where it has none."""

from __future__ import annotations

__all__ = ["checks"]

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from bedplate.conformance.allocator_machine import ints, run_machine
from bedplate.conformance.cases.attention import CALLS
from bedplate.conformance.check import Check, Wrong, require
from bedplate.contract.memory import AllocatorRequest, KVPoolRequest
from bedplate.errors import ContractError
from bedplate.memory.factory import make_allocator, make_kv_pool
from bedplate.scheduling.prefix_cache import PrefixCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from bedplate.conformance.subject import Subject
    from bedplate.contract.attention import AttentionCallSpec
    from bedplate.contract.memory import KVPool, TokenToKVPoolAllocator

_EXAMPLES, _STEPS = 25, 25
_POOL_TOKENS = 96


def checks(subject: Subject) -> Iterator[Check]:
    """Properties of the allocator, then of the pool in every dtype."""
    allocator: dict[str, Callable[[Subject], None]] = {
        "contradictions": _contradictions,
        "machine": _machine,
        "fragmentation": _fragmentation,
        "prefix_sharing": _prefix_sharing,
    }
    for name, run in allocator.items():
        yield Check(level=4, name=f"allocator/{name}", run=run)
    pool = {"round_trip": _round_trip, "move": _move, "host_copy": _host_copy,
            "padding": _padding, "alias": _alias}  # fmt: skip
    for dtype in subject.capabilities.kv_dtypes:
        for kind in ("odd_sizes", "latent"):
            for name, act in pool.items():
                run = partial(act, CALLS[kind], dtype)
                yield Check(level=4, name=f"pool/{name}/{kind}.{dtype}", run=run)


def allocator_of(subject: Subject, request: AllocatorRequest) -> TokenToKVPoolAllocator:
    """The backend's allocator, or the core's."""
    return subject.bound.make_allocator(request) or make_allocator(request)


def _machine(subject: Subject) -> None:
    sizes = tuple(dict.fromkeys(subject.capabilities.memory.page_sizes[:3]))
    make = partial(allocator_of, subject)
    run_machine(make, sizes, examples=_EXAMPLES, steps=_STEPS)


def _contradictions(subject: Subject) -> None:
    """Calls that cannot be meant raise, and change nothing."""
    size = subject.page_size
    allocator = allocator_of(subject, AllocatorRequest(num_tokens=8 * size, page_size=size))
    slots = allocator.alloc(2 * size)
    assert slots is not None
    cases: dict[str, Callable[[], object]] = {
        "a request that shrinks": lambda: allocator.alloc_extend(
            ints(size), ints(size - 1), ints(int(slots[size - 1]))
        ),
        "slots of int64": lambda: allocator.free(slots.astype(np.int64)),
        "a second free": lambda: _free_twice(allocator, slots),
        "the end of no group": allocator.free_group_end,
    }
    if size > 1:
        cases["a part of a page"] = lambda: allocator.alloc(1)
    for what, act in cases.items():
        try:
            act()
        except (ContractError, ValueError, TypeError, IndexError):
            require(allocator.available_size() == 6 * size, f"{what} is refused and still acts")
            continue
        raise Wrong(f"accepts {what}")
    allocator.free(slots)
    require(allocator.available_size() == 8 * size, "slots are lost after refused calls")


def _free_twice(allocator: TokenToKVPoolAllocator, slots: object) -> None:
    """Frees twice; takes the pages back, whatever came of it."""
    allocator.free_group_begin()
    allocator.free(slots)  # type: ignore[arg-type]
    allocator.free_group_end()
    try:
        allocator.free(slots)  # type: ignore[arg-type]
    finally:
        again = allocator.alloc(len(slots))  # type: ignore[arg-type]
        require(again is not None, "pages are lost")


def _fragmentation(subject: Subject) -> None:
    """Whatever was freed can be had again in whole: pages do not fragment."""
    size = subject.page_size
    allocator = allocator_of(subject, AllocatorRequest(num_tokens=64 * size, page_size=size))
    taken = [allocator.alloc(size) for _ in range(64)]
    for slots in taken[::2]:
        assert slots is not None
        allocator.free(slots)
    half = allocator.alloc(32 * size)
    require(half is not None, "half of the pool is free in single pages, and cannot be had")
    require(allocator.alloc(size) is None, "hands out more than there is")


def _prefix_sharing(subject: Subject) -> None:
    """The core's prefix cache over this allocator gives every page back exactly once."""
    size = subject.page_size
    allocator = allocator_of(subject, AllocatorRequest(num_tokens=32 * size, page_size=size))
    cache = PrefixCache(allocator, size)
    base = np.arange(4 * size, dtype=np.int32)
    slots = allocator.alloc(len(base))
    assert slots is not None
    cache.insert(base, slots)
    found, node = cache.match(base)
    require(bool((found == slots).all()), "the cache gives other slots than it was given")
    cache.lock(node)
    require(cache.evict(len(base)) == 0, "evicts what is in use")
    cache.unlock(node)
    cache.evict(2 * size)
    cache.clear()
    require(allocator.available_size() == 32 * size, "shared pages are lost or freed twice")


def _pool(subject: Subject, calls: tuple[AttentionCallSpec, ...], dtype: str) -> KVPool:
    size = subject.page_size
    request = KVPoolRequest(
        runtime=subject.bound.runtime, calls=calls, page_size=size,
        num_tokens=_POOL_TOKENS // size * size or size, dtype=getattr(torch, dtype),
    )  # fmt: skip
    return subject.bound.make_kv_pool(request) or make_kv_pool(request)


def _rows(
    subject: Subject, call: AttentionCallSpec, count: int, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn((count, call.num_kv_heads, call.head_dim), generator=generator)
    values = torch.randn((count, call.num_kv_heads, call.value_dim), generator=generator)
    device = subject.device
    return keys.to(device), None if call.value_in_key else values.to(device)


def _slots(subject: Subject, slots: list[int]) -> Tensor:
    index = getattr(torch, subject.capabilities.memory.index_dtype)
    return torch.tensor(slots, dtype=index, device=subject.device)


def _scattered(pool: KVPool, count: int) -> list[int]:
    order = torch.randperm(pool.num_tokens, generator=torch.Generator().manual_seed(3))
    return [int(i) + pool.page_size for i in order[:count]]


def _holds(storage: Tensor, places: list[int], rows: Tensor) -> bool:
    """Whether the rows lie there, cast once; compared on the host, where all can be indexed."""
    wanted = rows.cpu().to(storage.dtype).float()
    return torch.equal(storage.cpu().float()[places], wanted)


def _round_trip(call: AttentionCallSpec, dtype: str, subject: Subject) -> None:
    """What is written is there, cast once, and nothing else has changed."""
    pool = _pool(subject, (call,), dtype)
    shape = (pool.num_tokens + pool.page_size, call.num_kv_heads, call.head_dim)
    require(tuple(pool.key(0).shape) == shape, f"key() is {list(pool.key(0).shape)}")
    require(str(pool.key(0).dtype) == f"torch.{dtype}", f"key() is {pool.key(0).dtype}")
    require(pool.nbytes > 0, "nbytes is 0")
    before = pool.key(0).cpu().float()
    places = _scattered(pool, 9)
    keys, values = _rows(subject, call, 9)
    with subject.bound.runtime.inference_guard():
        pool.write(0, _slots(subject, places), keys, values)
    subject.bound.runtime.synchronize()
    require(_holds(pool.key(0), places, keys), "keys are not as they were written")
    wanted = keys[..., : call.value_dim] if values is None else values
    require(_holds(pool.value(0), places, wanted), "values are not as they were written")
    rest = [i for i in range(len(before)) if i not in places]
    require(torch.equal(pool.key(0).cpu().float()[rest], before[rest]), "writes other slots")


def _padding(call: AttentionCallSpec, dtype: str, subject: Subject) -> None:
    """Page 0 starts finite and takes the writes of many rows at once."""
    pool = _pool(subject, (call,), dtype)
    page = pool.key(0)[: pool.page_size].cpu().float()
    require(bool(page.isfinite().all()), "page 0 is not finite at first")
    keys, values = _rows(subject, call, 5)
    with subject.bound.runtime.inference_guard():
        pool.write(0, _slots(subject, [0] * 5), keys, values)
    page = pool.key(0)[: pool.page_size].cpu().float()
    require(bool(page.isfinite().all()), "slot 0 is spoiled by several writes")


def _move(call: AttentionCallSpec, dtype: str, subject: Subject) -> None:
    """Sets of slots that overlap move as if all were read first."""
    pool = _pool(subject, (call,), dtype)
    places = _scattered(pool, 6)
    keys, values = _rows(subject, call, 6)
    with subject.bound.runtime.inference_guard():
        pool.write(0, _slots(subject, places), keys, values)
        pool.move(_slots(subject, places[1:]), _slots(subject, places[:-1]))
    require(_holds(pool.key(0), places[1:], keys[:-1]), "move() loses overlapping slots")


def _host_copy(call: AttentionCallSpec, dtype: str, subject: Subject) -> None:
    """A copy on the host comes back bit for bit, at other slots."""
    pool = _pool(subject, (call,), dtype)
    places = _scattered(pool, 12)
    old, new = places[:6], places[6:]
    keys, values = _rows(subject, call, 6)
    with subject.bound.runtime.inference_guard():
        pool.write(0, _slots(subject, old), keys, values)
        copy = pool.get_cpu_copy(_slots(subject, old))
        require(_holds(pool.key(0), old, keys), "making a host copy changes the pool")
        pool.write(0, _slots(subject, old), *_rows(subject, call, 6, seed=1))
        pool.load_cpu_copy(copy, _slots(subject, new))
    require(copy.num_tokens == 6, f"the copy says it has {copy.num_tokens} tokens of 6")
    require(_holds(pool.key(0), new, keys), "a host copy does not come back as it was")


def _alias(call: AttentionCallSpec, dtype: str, subject: Subject) -> None:
    """A call that reads another's cache stores nothing of its own."""
    alias = replace(call, call_id=1, alias_of=0)
    pool = _pool(subject, (call, alias), dtype)
    alone = _pool(subject, (call,), dtype)
    keys, values = _rows(subject, call, 3)
    places = _scattered(pool, 3)
    with subject.bound.runtime.inference_guard():
        pool.write(0, _slots(subject, places), keys, values)
        other_keys, other_values = _rows(subject, call, 3, seed=1)
        pool.write(1, _slots(subject, places), other_keys, other_values)
    require(_holds(pool.key(1), places, keys), "an alias writes, or does not read its target")
    require(pool.nbytes == alone.nbytes, "an alias takes memory")
