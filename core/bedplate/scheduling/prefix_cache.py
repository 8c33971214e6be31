# SPDX-License-Identifier: Apache-2.0
"""PrefixCache: slots of token sequences that were computed before, to be used again.

A radix tree over token ids.  An edge holds whole pages; two edges of one node differ within
their first page.  What a request uses is locked from its node up to the root and cannot be
evicted; the rest is evicted from the leaves, least recently used first, by pages.

The cache owns the pages of its slots: it frees them to the allocator when it evicts.
Host only; the scheduler calls it, never in a steady decode step.
"""

from __future__ import annotations

__all__ = ["PrefixCache", "PrefixNode"]

import heapq
from itertools import count
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Int32Array = npt.NDArray[np.int32]

_NO_TOKENS = np.zeros(0, np.int32)


class SlotSink(Protocol):
    """Takes pages back."""

    def free(self, slots: Int32Array, /) -> None:
        """Return the pages of ``slots``."""


class PrefixNode:
    """An edge of the tree and the node below it. Opaque to callers: match, lock, unlock."""

    __slots__ = ("children", "locks", "parent", "slots", "tokens", "used")

    def __init__(
        self, parent: PrefixNode | None, tokens: Int32Array, slots: Int32Array
    ) -> None:
        self.parent = parent
        self.tokens = tokens
        self.slots = slots
        self.children: dict[bytes, PrefixNode] = {}
        self.locks = 0
        self.used = 0


class PrefixCache:
    """See the module.

    Args:
        allocator: Gets evicted pages.
        page_size: Tokens a page; everything is cut to whole pages.

    Attributes:
        total_size: Tokens held.
        evictable_size: Tokens held that nobody has locked.
    """

    def __init__(self, allocator: SlotSink, page_size: int) -> None:
        self._allocator = allocator
        self._page = page_size
        self._root = PrefixNode(None, _NO_TOKENS, _NO_TOKENS)
        self._clock = count(1)
        self._lru: list[tuple[int, int, PrefixNode]] = []
        self._ticket = count()
        self._num_nodes = 0
        self.total_size = 0
        self.evictable_size = 0

    def match(self, tokens: Int32Array) -> tuple[Int32Array, PrefixNode]:
        """Longest cached prefix of whole pages.

        Args:
            tokens: ``[n]`` int32. Pass all but the last one of a prompt, so that one token
                is left to compute.

        Returns:
            ``[m]`` int32 slots, a new array, and the node to lock before anything else is
            asked of the cache.
        """
        path, node = [_NO_TOKENS], self._root
        now, done = next(self._clock), 0
        while (child := self._child(node, tokens, done)) is not None:
            length = self._common(child, tokens, done)
            if length < len(child.tokens):
                child = self._split(child, length)
            self._touch(child, now)
            path.append(child.slots)
            done += length
            node = child
        return np.concatenate(path), node

    def insert(self, tokens: Int32Array, slots: Int32Array) -> tuple[int, PrefixNode]:
        """Hand over the slots of a computed sequence.

        Args:
            tokens: ``[n]`` int32, ``n`` a multiple of the page size.
            slots: ``[n]`` int32. Those beyond the returned length belong to the cache now;
                those before it stay the caller's unless they came from the cache.

        Returns:
            Tokens that were cached already, and the node of the whole sequence.
        """
        cached, node = self.match(tokens)
        done = len(cached)
        if done < len(tokens):
            child = PrefixNode(node, tokens[done:].copy(), slots[done:].copy())
            node.children[self._key(tokens, done)] = child
            self._num_nodes += 1
            self.total_size += len(child.tokens)
            self.evictable_size += len(child.tokens)
            self._touch(child, next(self._clock))
            node = child
        return done, node

    def lock(self, node: PrefixNode) -> None:
        """Keep a node and all above it until ``unlock``."""
        walk: PrefixNode | None = node
        while walk is not None:
            if walk.locks == 0:
                self.evictable_size -= len(walk.tokens)
            walk.locks += 1
            walk = walk.parent

    def unlock(self, node: PrefixNode) -> None:
        """Undo one ``lock``."""
        walk: PrefixNode | None = node
        while walk is not None:
            walk.locks -= 1
            if walk.locks == 0:
                self.evictable_size += len(walk.tokens)
                self._offer(walk)
            walk = walk.parent

    def evict(self, num_tokens: int) -> int:
        """Free at least so many tokens if they can be had, least recently used first.

        Returns:
            Tokens freed; a multiple of the page size.
        """
        freed = 0
        while freed < num_tokens and self._lru:
            used, _, node = heapq.heappop(self._lru)
            if used == node.used and self._evictable(node):
                freed += self._trim(node, num_tokens - freed)
        return freed

    def clear(self) -> int:
        """Evict everything that nobody has locked; returns the tokens freed."""
        return self.evict(self.total_size)

    def _trim(self, node: PrefixNode, num_tokens: int) -> int:
        """Drop the last pages of a leaf, at most the whole leaf."""
        size = min(len(node.tokens), -(-num_tokens // self._page) * self._page)
        keep = len(node.tokens) - size
        self._allocator.free(node.slots[keep:])
        self.total_size -= size
        self.evictable_size -= size
        if keep:
            node.tokens, node.slots = node.tokens[:keep], node.slots[:keep]
            self._offer(node)
            return size
        parent = node.parent
        assert parent is not None  # the root holds no tokens and is never offered
        del parent.children[self._key(node.tokens, 0)]
        node.parent = None
        self._num_nodes -= 1
        self._offer(parent)
        return size

    def _child(self, node: PrefixNode, tokens: Int32Array, start: int) -> PrefixNode | None:
        if len(tokens) - start < self._page:
            return None
        return node.children.get(self._key(tokens, start))

    def _key(self, tokens: Int32Array, start: int) -> bytes:
        return tokens[start : start + self._page].tobytes()

    def _common(self, node: PrefixNode, tokens: Int32Array, start: int) -> int:
        """Leading tokens of the edge that agree, cut to whole pages; at least one page."""
        length = min(len(node.tokens), len(tokens) - start)
        differ = np.flatnonzero(node.tokens[:length] != tokens[start : start + length])
        if len(differ):
            length = int(differ[0])
        return length // self._page * self._page

    def _split(self, node: PrefixNode, length: int) -> PrefixNode:
        """Cut an edge in two; the given node keeps its identity and the lower part."""
        upper = PrefixNode(node.parent, node.tokens[:length], node.slots[:length])
        upper.locks, upper.used = node.locks, node.used
        self._num_nodes += 1
        upper.children[self._key(node.tokens, length)] = node
        assert node.parent is not None  # the root has no edge
        node.parent.children[self._key(node.tokens, 0)] = upper
        node.parent = upper
        node.tokens, node.slots = node.tokens[length:], node.slots[length:]
        return upper

    def _touch(self, node: PrefixNode, now: int) -> None:
        node.used = now
        self._offer(node)

    def _evictable(self, node: PrefixNode) -> bool:
        return node.locks == 0 and not node.children and node.parent is not None

    def _offer(self, node: PrefixNode) -> None:
        """Queue a node for eviction; stale entries are skipped when they come up."""
        if not self._evictable(node):
            return
        heapq.heappush(self._lru, (node.used, next(self._ticket), node))
        if len(self._lru) > 64 + 4 * self._num_nodes:
            self._compact()

    def _compact(self) -> None:
        """Drop entries that are stale or double."""
        fresh = {
            id(node): (used, ticket, node)
            for used, ticket, node in self._lru
            if used == node.used and self._evictable(node)
        }
        self._lru = list(fresh.values())
        heapq.heapify(self._lru)
