# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from bedplate.conformance.allocator_machine import AllocatorMachine
from bedplate.contract.memory import AllocatorRequest
from bedplate.errors import ContractError
from bedplate.memory.allocator import PagedAllocator
from bedplate.memory.factory import make_allocator


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def allocator_with_free(pages: list[int], *, num_pages: int, page_size: int) -> PagedAllocator:
    """An allocator in which exactly ``pages`` are free, to be handed out in that order."""
    allocator = PagedAllocator(num_pages * page_size, page_size)
    allocator.alloc_pages(num_pages)
    allocator.free_pages(ints(*pages))
    return allocator


def free_pages_of(allocator: PagedAllocator) -> list[int]:
    pages = allocator.alloc_pages(allocator.available_pages())
    assert pages is not None
    allocator.free_pages(pages)
    return pages.tolist()


# The vectors of the specification.


def test_v19_extend():
    allocator = allocator_with_free([7, 8, 9, 10], num_pages=10, page_size=4)
    slots = allocator.alloc_extend(ints(5, 0), ints(10, 3), ints(20, -1))
    assert slots.tolist() == [21, 22, 23, 28, 29, 32, 33, 34]
    assert slots.dtype == np.int32
    assert free_pages_of(allocator) == [9, 10]


def test_v19_decode():
    allocator = allocator_with_free([9, 10, 12], num_pages=12, page_size=4)
    slots = allocator.alloc_decode(ints(9, 6, 1), ints(35, 20, -1))
    assert slots.tolist() == [36, 21, 40]
    assert slots.dtype == np.int32
    assert free_pages_of(allocator) == [12]


def test_v19_extend_three_requests():
    allocator = allocator_with_free([3, 5, 7, 9, 11], num_pages=11, page_size=4)
    slots = allocator.alloc_extend(ints(4, 6, 0), ints(6, 8, 9), ints(11, 41, -1))
    assert slots.tolist() == [12, 13, 42, 43, 20, 21, 22, 23, 28, 29, 30, 31, 36]
    assert free_pages_of(allocator) == [11]


def test_v19_exhaustion_leaves_the_state():
    allocator = allocator_with_free([2], num_pages=4, page_size=4)
    assert allocator.alloc_extend(ints(0), ints(5), ints(-1)) is None
    assert allocator.alloc_decode(ints(1, 1), ints(-1, -1)) is None
    assert allocator.alloc(8) is None
    assert free_pages_of(allocator) == [2]


def test_v19b_a_later_row_without_need_does_not_read_past_the_last_page():
    allocator = allocator_with_free([5], num_pages=5, page_size=4)
    assert allocator.alloc_decode(ints(9, 7), ints(35, 13)).tolist() == [20, 14]
    assert allocator.available_size() == 0


# Against a loop that says the same thing slowly.


def slots_by_loop(
    pages: list[int], page_size: int, prefix: int, length: int, last: int
) -> list[int]:
    slots = []
    for position in range(prefix, length):
        last = last + 1 if position % page_size else pages.pop(0) * page_size
        slots.append(last)
    return slots


@given(
    page_size=st.sampled_from([1, 2, 4, 16]),
    steps=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8),
    order=st.randoms(use_true_random=False),
)
def test_extend_equals_a_loop_over_tokens(page_size: int, steps: list, order):
    num_pages = 400
    pages = list(range(1, num_pages + 1))
    order.shuffle(pages)
    # Prefixes lie on pages that are not free.
    prefix_pages = {row: pages.pop() for row in range(len(steps))}
    allocator = allocator_with_free(pages, num_pages=num_pages, page_size=page_size)
    prefixes = [prefix for prefix, _ in steps]
    lasts = [
        prefix_pages[row] * page_size + (prefix - 1) % page_size if prefix else -1
        for row, prefix in enumerate(prefixes)
    ]
    lengths = [prefix + new for prefix, new in steps]
    want = [
        slot
        for prefix, length, last in zip(prefixes, lengths, lasts, strict=True)
        for slot in slots_by_loop(pages, page_size, prefix, length, last)
    ]
    got = allocator.alloc_extend(ints(*prefixes), ints(*lengths), ints(*lasts))
    assert got.tolist() == want
    assert free_pages_of(allocator) == pages


def test_decode_is_an_extension_by_one():
    def fresh() -> PagedAllocator:
        return allocator_with_free([3, 9, 4], num_pages=9, page_size=4)

    seq_lens, last_loc = ints(5, 1, 7, 9), ints(7, -1, 21, 31)
    by_decode = fresh().alloc_decode(seq_lens, last_loc)
    by_extend = fresh().alloc_extend(seq_lens - 1, seq_lens, last_loc)
    assert by_decode.tolist() == by_extend.tolist() == [12, 36, 22, 16]


def test_inputs_are_not_changed():
    allocator = PagedAllocator(64, 4)
    seq_lens, last_loc = ints(1, 1), ints(-1, -1)
    allocator.alloc_decode(seq_lens, last_loc)
    allocator.alloc_extend(seq_lens - 1, seq_lens, last_loc)
    assert seq_lens.tolist() == [1, 1]
    assert last_loc.tolist() == [-1, -1]


# Preconditions.


@pytest.mark.parametrize(
    ("prefix", "length", "last"),
    [
        pytest.param(5, 6, 21, id="offset of another position"),
        pytest.param(5, 6, -1, id="no last slot"),
        pytest.param(4, 5, -1, id="no last slot, full page"),
        pytest.param(5, 6, 0, id="last slot on the page of padding"),
        pytest.param(0, 1, 19, id="last slot without a prefix"),
        pytest.param(-4, 4, -1, id="negative prefix"),
        pytest.param(6, 5, 21, id="shrinks"),
    ],
)
def test_a_contradiction_is_refused_and_changes_nothing(prefix: int, length: int, last: int):
    allocator = PagedAllocator(64, 4)
    with pytest.raises(ContractError) as caught:
        allocator.alloc_extend(ints(0, prefix), ints(3, length), ints(-1, last))
    assert "request" in str(caught.value)
    assert allocator.available_size() == 64


def test_decode_names_the_rows_that_contradict():
    allocator = PagedAllocator(64, 4)
    with pytest.raises(ContractError, match=r"requests \[0, 2\]"):
        allocator.alloc_decode(ints(0, 1, 7), ints(-1, -1, 20))
    assert allocator.available_size() == 64


def test_last_slots_do_not_matter_for_single_token_pages():
    allocator = PagedAllocator(8, 1)
    assert allocator.alloc_extend(ints(3, 0), ints(5, 1), ints(0, 0)).tolist() == [1, 2, 3]
    assert allocator.alloc_decode(ints(6), ints(0)).tolist() == [4]
    with pytest.raises(ContractError, match="1 of 2 requests would shrink"):
        allocator.alloc_extend(ints(0, 3), ints(9, 2), ints(-1, 0))


@pytest.mark.parametrize("page_size", [1, 4])
def test_empty_requests_get_empty_slots(page_size: int):
    allocator = PagedAllocator(8, page_size)
    none = ints()
    assert allocator.alloc_extend(none, none, none).tolist() == []
    assert allocator.alloc_decode(none, none).tolist() == []
    assert allocator.alloc(0).tolist() == []
    allocator.free(none)
    assert allocator.available_size() == 8


@pytest.mark.parametrize("num_tokens", [3, -1, -4])
def test_alloc_wants_whole_pages(num_tokens: int):
    with pytest.raises(ContractError, match="cannot allocate"):
        PagedAllocator(8, 4).alloc(num_tokens)


@pytest.mark.parametrize(
    ("num_tokens", "page_size"), [(10, 4), (8, 0), (-4, 4), (2**31, 1), (2**31, 8)]
)
def test_sizes_that_cannot_be(num_tokens: int, page_size: int):
    with pytest.raises(ContractError):
        PagedAllocator(num_tokens, page_size)


def test_alloc_gives_slots_page_after_page_and_never_page_zero():
    allocator = PagedAllocator(12, 4)
    assert allocator.alloc(8).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert allocator.alloc(4).tolist() == [12, 13, 14, 15]
    assert allocator.available_size() == 0


# Freeing.


def test_slots_of_one_page_free_it_once():
    allocator = PagedAllocator(16, 4)
    allocator.alloc(16)
    allocator.free(ints(5, 8, 9, 4, 6, 11, 7))
    assert sorted(free_pages_of(allocator)) == [1, 2]


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("slot", [0, -1, 64 + 4, 2**31 - 1])
def test_page_zero_and_foreign_slots_are_refused(page_size: int, slot: int):
    allocator = PagedAllocator(64, page_size)
    slots = allocator.alloc(64)
    with pytest.raises(ContractError) as caught:
        allocator.free(np.append(slots, np.int32(slot)))
    assert caught.value.outside == [slot // page_size]
    assert allocator.available_size() == 0


def test_two_parts_of_a_page_in_two_calls_are_a_double_free():
    allocator = PagedAllocator(8, 4)
    slots = allocator.alloc(4)
    allocator.free(slots[:2])
    with pytest.raises(ContractError, match="already free: 1"):
        allocator.free(slots[2:])
    assert free_pages_of(allocator) == [1, 2]


def test_a_slot_named_twice_is_a_double_free_in_single_token_pages():
    allocator = PagedAllocator(8, 1)
    allocator.alloc(8)
    with pytest.raises(ContractError, match="named twice: 3"):
        allocator.free(ints(3, 5, 3))
    assert allocator.available_size() == 0


def test_slots_must_be_int32():
    allocator = PagedAllocator(8, 4)
    slots = allocator.alloc(8).astype(np.int64)
    with pytest.raises(ContractError, match="int32"):
        allocator.free(slots)


# Free groups.


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_group_frees_at_its_end(page_size: int):
    allocator = PagedAllocator(16, page_size)
    slots = allocator.alloc(16)
    allocator.free_group_begin()
    queued = slots[:4].copy()
    allocator.free(queued)
    queued[:] = 0  # the caller may reuse its array
    allocator.free(slots[8:])
    assert allocator.available_size() == 0
    allocator.free_group_end()
    assert allocator.available_size() == 12


def test_parts_of_a_page_in_one_group_free_it_once():
    allocator = PagedAllocator(8, 4)
    slots = allocator.alloc(8)
    allocator.free_group_begin()
    allocator.free(slots[:2])
    allocator.free(slots[2:4])
    allocator.free_group_end()
    assert free_pages_of(allocator) == [1]


def test_a_refused_group_is_closed_and_frees_nothing():
    allocator = PagedAllocator(8, 1)
    slots = allocator.alloc(4)
    allocator.free_group_begin()
    allocator.free(slots)
    allocator.free(slots[:1])
    with pytest.raises(ContractError, match="named twice: 1"):
        allocator.free_group_end()
    assert allocator.available_size() == 4
    allocator.free(slots)
    assert allocator.available_size() == 8


def test_groups_do_not_nest_and_an_empty_one_frees_nothing():
    allocator = PagedAllocator(8, 1)
    with pytest.raises(ContractError, match="none is open"):
        allocator.free_group_end()
    allocator.free_group_begin()
    for act in (
        allocator.free_group_begin,
        allocator.backup_state,
        lambda: allocator.restore_state(PagedAllocator(8, 1).backup_state()),
    ):
        with pytest.raises(ContractError, match="a free group is open"):
            act()
    allocator.free_group_end()
    assert allocator.available_size() == 8


def test_a_bad_array_is_refused_when_it_is_queued():
    allocator = PagedAllocator(8, 1)
    allocator.alloc(8)
    allocator.free_group_begin()
    with pytest.raises(ContractError, match="int32"):
        allocator.free(np.array([1]))


def test_clear_forgets_an_open_group():
    allocator = PagedAllocator(8, 1)
    slots = allocator.alloc(4)
    allocator.free_group_begin()
    allocator.free(slots)
    allocator.clear()
    assert allocator.available_size() == 8
    assert allocator.alloc(1).tolist() == [1]
    allocator.free(ints(1))
    assert allocator.available_size() == 8


# Backup and restore.


def test_restore_undoes_allocations_and_frees():
    allocator = PagedAllocator(32, 4)
    kept = allocator.alloc(8)
    state = allocator.backup_state()
    allocator.alloc(16)
    allocator.free(kept)
    allocator.restore_state(state)
    assert free_pages_of(allocator) == [3, 4, 5, 6, 7, 8]
    allocator.free(kept)
    assert allocator.available_size() == 32


def test_a_backup_of_another_size_is_refused():
    with pytest.raises(ContractError, match="no backup"):
        PagedAllocator(32, 4).restore_state(PagedAllocator(16, 4).backup_state())


def test_the_factory_makes_one_of_the_requested_size():
    allocator = make_allocator(AllocatorRequest(num_tokens=32, page_size=4))
    assert (allocator.page_size, allocator.available_size()) == (4, 32)


class PagedAllocatorMachine(AllocatorMachine):
    """The kit's machine, and what our allocator offers beyond the contract: pages."""

    make = staticmethod(make_allocator)
    page_sizes = (1, 4, 16)

    @rule(count=st.integers(0, 50))
    def alloc_pages(self, count: int) -> None:
        pages = self.granted(self.allocator.alloc_pages(count), count)
        if pages is not None and count:
            slots = pages[:, None] * self.page_size + np.arange(self.page_size)
            self.requests.append(slots.flatten().tolist())

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def free_pages(self, data) -> None:
        row = data.draw(st.integers(0, len(self.requests) - 1))
        pages = data.draw(st.permutations(sorted(self.pages(self.requests.pop(row)))))
        self.allocator.free_pages(ints(*pages))

    @rule(data=st.data())
    def free_pages_wrongly(self, data) -> None:
        taken = set(self.taken)
        wrong = sorted({0, -1, self.num_pages + 1, *range(1, self.num_pages + 1)} - taken)
        pages = [data.draw(st.sampled_from(wrong)), *data.draw(st.permutations(sorted(taken)))]
        before = self.allocator.backup_state().data.free.tolist()
        with pytest.raises(ContractError):
            self.allocator.free_pages(ints(*pages))
        assert self.allocator.backup_state().data.free.tolist() == before


TestAllocatorMachine = PagedAllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=60, stateful_step_count=40)
