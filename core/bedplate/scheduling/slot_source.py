# SPDX-License-Identifier: Apache-2.0
"""SlotSource: slots for tokens, from the allocator or by evicting cached prefixes.

The one place that knows both the allocator and the prefix cache, so that the scheduler asks
for slots and is told yes or no.  Nothing is evicted for a demand that cannot be met.
"""

from __future__ import annotations

__all__ = ["SlotSource"]

from typing import TYPE_CHECKING

import numpy as np

from bedplate.scheduling.policy import pages_for
from bedplate.scheduling.prefix_cache import PrefixCache

if TYPE_CHECKING:
    import numpy.typing as npt

    from bedplate.contract.memory import TokenToKVPoolAllocator
    from bedplate.scheduling.request import Request

    Int32Array = npt.NDArray[np.int32]


class SlotSource:
    """See the module.

    Args:
        allocator: Everything in it is free and ours.
        page_size: Tokens a page.
        prefix_cache: Whether computed prefixes are kept.

    Attributes:
        capacity: Tokens that one request could get at most.
        cache: The prefix cache, or ``None``.
    """

    def __init__(
        self, allocator: TokenToKVPoolAllocator, page_size: int, *, prefix_cache: bool
    ) -> None:
        self._allocator = allocator
        self._page = page_size
        self.capacity = allocator.available_size()
        self.cache = PrefixCache(allocator, page_size) if prefix_cache else None

    def free_size(self) -> int:
        """Tokens that could be handed out now, cached ones that nobody uses included."""
        spare = self.cache.evictable_size if self.cache else 0
        return self._allocator.available_size() + spare

    def decode(self, seq_lens: Int32Array, last_slots: Int32Array) -> Int32Array | None:
        """One slot per request; arguments as ``alloc_decode``; ``None`` = no room."""
        slots = self._allocator.alloc_decode(seq_lens, last_slots)
        if slots is not None:
            return slots
        pages = int(np.count_nonzero((seq_lens - 1) % self._page == 0))
        if not self._evict_for(pages):
            return None
        return self._allocator.alloc_decode(seq_lens, last_slots)

    def extend(self, start: int, end: int, last_slot: int) -> Int32Array | None:
        """Slots for the tokens ``start … end`` of one request; ``None`` = no room."""
        pages = pages_for(end, self._page) - pages_for(start, self._page)
        if not self._evict_for(pages):
            return None
        return self._allocator.alloc_extend(_one(start), _one(end), _one(last_slot))

    def borrow(self, request: Request, most: int) -> None:
        """Lock the longest cached prefix of a request's tokens.

        Args:
            request: Gets ``node``, ``borrowed`` and ``shared_len``.
            most: Tokens that may be taken from the cache.
        """
        if self.cache is None:
            return
        request.borrowed, request.node = self.cache.match(request.tokens[:most])
        self.cache.lock(request.node)
        request.shared_len = len(request.borrowed)

    def publish(self, request: Request, tokens: Int32Array, slots: Int32Array) -> None:
        """Share the computed pages of a running request, unless somebody else did.

        Args:
            request: ``node`` and ``shared_len`` move on.
            tokens: ``[n]`` its computed tokens.
            slots: ``[n]`` their slots.
        """
        whole = len(tokens) // self._page * self._page
        if self.cache is None or whole == request.shared_len:
            return
        cached, node = self.cache.match(tokens[:whole])
        if len(cached) != request.shared_len:
            return  # ours are private copies of pages that exist: settled when it leaves
        _, node = self.cache.insert(tokens[:whole], slots[:whole])
        self.cache.lock(node)
        self.give_up(request)
        request.node, request.shared_len = node, whole

    def give_up(self, request: Request) -> None:
        """Unlock what a request borrowed."""
        if self.cache is not None and request.node is not None:
            self.cache.unlock(request.node)
        request.node, request.shared_len = None, 0

    def release(self, request: Request, tokens: Int32Array, slots: Int32Array) -> None:
        """Take back everything a request has.

        Args:
            request: Leaves its row.
            tokens: ``[n]`` tokens whose keys and values are good; they may be cached.
            slots: ``[m]`` all its slots, ``m ≥ n``.
        """
        shared = request.shared_len
        whole = len(tokens) // self._page * self._page
        if self.cache is None or whole <= shared:
            self._allocator.free(slots[shared:])
        else:
            cached, _ = self.cache.insert(tokens[:whole], slots[:whole])
            self._allocator.free(np.concatenate([slots[shared:cached], slots[whole:]]))
        self.give_up(request)

    def _evict_for(self, pages: int) -> bool:
        missing = pages * self._page - self._allocator.available_size()
        if missing <= 0:
            return True
        if self.cache is None or self.cache.evictable_size < missing:
            return False
        return self.cache.evict(missing) >= missing


def _one(value: int) -> Int32Array:
    return np.array([value], np.int32)
