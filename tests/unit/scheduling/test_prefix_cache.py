# SPDX-License-Identifier: Apache-2.0
"""The prefix cache against a dictionary of prefixes, and its promises about eviction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bedplate.memory.allocator import PagedAllocator
from bedplate.scheduling.prefix_cache import PrefixCache

CAPACITY = 48


def tokens_of(*values):
    return np.array(values, np.int32)


class CacheMachine(RuleBasedStateMachine):
    """Requests match, compute the rest, insert and leave, as the scheduler does it."""

    @initialize(page=st.sampled_from([1, 2, 4]))
    def start(self, page):
        self.page = page
        self.allocator = PagedAllocator(CAPACITY, page)
        self.cache = PrefixCache(self.allocator, page)
        self.kept: dict[tuple[int, ...], int] = {}  # prefix of whole pages → its last slot
        self.running = []  # (tokens, slots, node, borrowed)
        self.privately_held = 0

    def longest(self, tokens):
        size = len(tokens) // self.page * self.page
        while size and tuple(tokens[:size]) not in self.kept:
            size -= self.page
        return size

    def forget_evicted(self):
        """Whatever is still matched is there; the model follows."""
        for prefix in list(self.kept):
            slots, _ = self.cache.match(np.array(prefix, np.int32))
            if len(slots) < len(prefix):
                del self.kept[prefix]

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=14))
    def begin(self, tokens):
        tokens = np.array(tokens, np.int32)
        slots, node = self.cache.match(tokens)
        assert len(slots) == self.longest(tokens)
        for end in range(self.page, len(slots) + 1, self.page):
            assert slots[end - 1] == self.kept[tuple(tokens[:end])]
        self.cache.lock(node)
        rest = -(-(len(tokens) - len(slots)) // self.page) * self.page
        new = self.allocator.alloc(rest)
        if new is None:
            missing = rest - self.allocator.available_size()
            can = self.cache.evictable_size >= missing
            freed = self.cache.evict(missing)
            self.forget_evicted()
            assert (freed >= missing) == can
            new = self.allocator.alloc(rest)
        if new is None:
            self.cache.unlock(node)
            return
        self.running.append((tokens, np.concatenate([slots, new]), node, len(slots)))
        self.privately_held += rest

    @precondition(lambda self: self.running)
    @rule(data=st.data(), keep=st.booleans())
    def leave(self, data, keep):
        place = data.draw(st.integers(0, len(self.running) - 1))
        tokens, slots, node, borrowed = self.running.pop(place)
        whole = len(tokens) // self.page * self.page if keep else borrowed
        existing = borrowed
        if keep:
            existing, _ = self.cache.insert(tokens[:whole], slots[:whole])
            assert existing == self.longest(tokens)
            for end in range(existing + self.page, whole + 1, self.page):
                self.kept[tuple(tokens[:end])] = slots[end - 1]
        self.allocator.free(slots[borrowed:existing])
        self.allocator.free(slots[max(whole, existing) :])
        self.cache.unlock(node)
        self.privately_held -= len(slots) - borrowed

    @rule(amount=st.integers(1, 20))
    def evict(self, amount):
        before = self.cache.evictable_size
        freed = self.cache.evict(amount)
        assert freed >= min(amount, before)
        assert freed < amount + self.page
        self.forget_evicted()

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "cache"):
            held = self.cache.total_size
            assert held == len(self.kept) * self.page
            assert self.allocator.available_size() + held + self.privately_held == CAPACITY

    @invariant()
    def what_is_borrowed_stays(self):
        for tokens, slots, _, borrowed in getattr(self, "running", ()):
            again, _ = self.cache.match(tokens[:borrowed])
            assert np.array_equal(again, slots[:borrowed])

    def teardown(self):
        for _, _, node, _ in getattr(self, "running", ()):
            self.cache.unlock(node)
        if hasattr(self, "cache"):
            assert self.cache.evictable_size == self.cache.total_size
            assert self.cache.clear() == len(self.kept) * self.page
            assert self.cache.total_size == 0


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.fixture
def cache():
    allocator = PagedAllocator(64, 2)
    return PrefixCache(allocator, 2), allocator


def keep(cache, allocator, *tokens):
    slots = allocator.alloc(len(tokens))
    cache.insert(tokens_of(*tokens), slots)
    return slots


def test_least_recently_used_goes_first(cache):
    cache, allocator = cache
    keep(cache, allocator, 1, 1, 5, 5)
    keep(cache, allocator, 2, 2)
    keep(cache, allocator, 3, 3)
    cache.match(tokens_of(2, 2))
    assert cache.evict(6) == 6
    assert len(cache.match(tokens_of(2, 2))[0]) == 2
    assert len(cache.match(tokens_of(1, 1))[0]) == 0


def test_a_long_leaf_loses_its_end_first(cache):
    cache, allocator = cache
    slots = keep(cache, allocator, 1, 2, 3, 4, 5, 6)
    assert cache.evict(1) == 2
    found, _ = cache.match(tokens_of(1, 2, 3, 4, 5, 6))
    assert found.tolist() == slots[:4].tolist()


def test_locks_cover_the_way_to_the_root_but_not_siblings(cache):
    cache, allocator = cache
    keep(cache, allocator, 1, 1, 2, 2)
    keep(cache, allocator, 1, 1, 3, 3)
    _, node = cache.match(tokens_of(1, 1, 3, 3))
    cache.lock(node)
    assert cache.clear() == 2
    assert len(cache.match(tokens_of(1, 1, 3, 3))[0]) == 4
    assert len(cache.match(tokens_of(1, 1, 2, 2))[0]) == 2
    cache.unlock(node)
    assert cache.clear() == 4


def test_a_split_keeps_locks_with_both_halves(cache):
    cache, allocator = cache
    keep(cache, allocator, 1, 1, 2, 2, 3, 3)
    _, whole = cache.match(tokens_of(1, 1, 2, 2, 3, 3))
    cache.lock(whole)
    _, half = cache.match(tokens_of(1, 1))
    cache.lock(half)
    cache.unlock(whole)
    assert cache.clear() == 4
    assert len(cache.match(tokens_of(1, 1))[0]) == 2


def test_many_touches_do_not_grow_the_queue(cache):
    cache, allocator = cache
    keep(cache, allocator, 1, 1)
    for _ in range(1000):
        cache.match(tokens_of(1, 1))
    assert len(cache._lru) < 100
    assert cache.evict(2) == 2
