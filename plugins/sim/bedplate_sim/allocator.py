# SPDX-License-Identifier: Apache-2.0
"""Device memory: blocks with addresses, caches that hand them out again, a limit, poison.

A block is memory of the host that nobody but queued work touches.  It goes through several
lives; the number of the life tells an address that is still the same tensor from one that has
become another.
"""

from __future__ import annotations

__all__ = ["Allocation", "Allocator", "Block", "Pool", "poison"]

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bedplate_sim.races import Access

_GRAIN = 512
_POISON = 0x7FFF
"""Repeated every two bytes: not a number in every float type, and huge in every integer."""


@dataclass(eq=False, slots=True)
class Block:
    """One piece of memory.

    Attributes:
        bytes: ``[n]`` uint8 on the host.
        life: Grows whenever the block is given back.
        writer: The last piece of work that wrote it.
        readers: Stream → the last piece of work there that read it since.
    """

    bytes: Tensor
    life: int = 0
    writer: Access | None = None
    readers: dict[int, Access] = field(default_factory=dict)

    @property
    def address(self) -> int:
        """What ``data_ptr`` says."""
        return self.bytes.data_ptr()


@dataclass(eq=False, slots=True, weakref_slot=True)
class Pool:
    """Blocks that one stream, or the graphs of one device, use again.

    Attributes:
        free: Blocks that nobody holds, smallest first.
        blocks: All of them, for a pool of graphs; such a pool is ``rewound``, not searched
            beyond what a capture needs.
        graphs: Live graphs whose memory this is.
    """

    free: list[Block] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    graphs: WeakSet[object] = field(default_factory=WeakSet)

    def rewind(self) -> None:
        """Let the next capture use the memory of all earlier ones, results included."""
        for block in self.blocks:
            block.life += 1
        self.free = sorted(self.blocks, key=_size)


class Allocation:
    """One life of a block; all tensors over it hold this, and the last one ends it."""

    __slots__ = ("_allocator", "block", "life", "pool")

    def __init__(self, allocator: Allocator, block: Block, pool: Pool) -> None:
        self.block, self.life, self.pool = block, block.life, pool
        self._allocator = allocator

    def __del__(self) -> None:
        # Any thread, at any moment: the allocator takes it in when it is next asked.
        self._allocator.returned.append((self.block, self.life, self.pool))


class Allocator:
    """Caches blocks as a device's allocator does.

    Args:
        limit: Bytes of the device.

    Attributes:
        limit: Bytes of the device.
        reserved: Bytes taken from it, cached ones included.
        returned: Ends of lives that were not taken in yet.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reserved = 0
        self.returned: deque[tuple[Block, int, Pool]] = deque()
        self._pools: WeakSet[Pool] = WeakSet()

    @property
    def allocated(self) -> int:
        """Bytes of live tensors."""
        self._take_in()
        idle = (block.bytes.nbytes for pool in self._pools for block in pool.free)
        return self.reserved - sum(idle)

    def new_pool(self) -> Pool:
        """A cache of its own."""
        pool = Pool()
        self._pools.add(pool)
        return pool

    def allocate(self, nbytes: int, pool: Pool, *, recorded: bool = False) -> Allocation:
        """The smallest cached block that fits, else a new one.

        Raises:
            torch.OutOfMemoryError: The device has too little memory.
        """
        size = max(1, -(-nbytes // _GRAIN)) * _GRAIN
        self._take_in()
        place = bisect_left(pool.free, size, key=_size)
        if place < len(pool.free) and (recorded or _size(pool.free[place]) <= 2 * size):
            block = pool.free.pop(place)
        else:
            block = self._new(size)
            if recorded:
                pool.blocks.append(block)
        return Allocation(self, block, pool)

    def empty_cache(self) -> None:
        """Give every block that nobody holds back to the device."""
        self._take_in()
        for pool in self._pools:
            if not pool.graphs:
                self.reserved -= sum(block.bytes.nbytes for block in pool.free)
                pool.free.clear()
                pool.blocks.clear()

    def _new(self, size: int) -> Block:
        if self.reserved + size > self.limit:
            self.empty_cache()
        if self.reserved + size > self.limit:
            raise torch.OutOfMemoryError(
                f"simulated device out of memory: {size:,} bytes were asked for, "
                f"{self.limit - self.reserved:,} of {self.limit:,} are free"
            )
        self.reserved += size
        block = Block(torch.empty(size, dtype=torch.uint8))
        poison(block.bytes)
        return block

    def _take_in(self) -> None:
        while self.returned:
            block, life, pool = self.returned.popleft()
            if block.life == life:
                block.life += 1
                insort(pool.free, block, key=_size)


def _size(block: Block) -> int:
    return block.bytes.nbytes


def poison(memory: Tensor) -> None:
    """Overwrite a host tensor over device memory, or a part of it, by what nobody can miss."""
    begin, size = memory.storage_offset() * memory.itemsize, memory.nbytes
    if memory.is_contiguous() and begin % 2 == size % 2 == 0:
        words = torch.empty(0, dtype=torch.int16)
        words.set_(memory.untyped_storage(), begin // 2, (size // 2,), (1,)).fill_(_POISON)
    elif memory.is_floating_point():
        memory.fill_(float("nan"))
    elif memory.dtype != torch.bool:
        memory.fill_(torch.iinfo(memory.dtype).max)
