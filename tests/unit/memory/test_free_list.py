# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bedplate.errors import ContractError
from bedplate.memory.free_list import FreeList


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def drain(free_list: FreeList) -> list[int]:
    taken = free_list.alloc(free_list.num_free)
    assert taken is not None
    free_list.free(taken)
    return taken.tolist()


def test_ids_start_at_one_and_come_in_order():
    free_list = FreeList(5)
    assert free_list.alloc(2).tolist() == [1, 2]
    assert free_list.alloc(3).tolist() == [3, 4, 5]
    assert free_list.num_free == 0


def test_returned_ids_are_handed_out_next_in_the_given_order():
    free_list = FreeList(6)
    free_list.alloc(5)
    free_list.free(ids(4, 1, 2))
    assert drain(free_list) == [4, 1, 2, 6]


def test_too_many_is_none_and_changes_nothing():
    free_list = FreeList(3)
    free_list.alloc(1)
    assert free_list.alloc(3) is None
    assert drain(free_list) == [2, 3]


def test_zero_ids_are_always_there():
    free_list = FreeList(0)
    assert free_list.alloc(0).tolist() == []
    free_list.free(ids())
    assert free_list.alloc(1) is None


def test_negative_count_is_an_error():
    with pytest.raises(ContractError, match="cannot allocate -1 pages"):
        FreeList(3).alloc(-1)


# Sizes reach every way of checking: few of many ids, many of all ids, one long run.
@pytest.mark.parametrize(("size", "taken"), [(1000, 5), (10, 5), (5000, 600), (100_000, 5)])
@pytest.mark.parametrize(
    ("wrong", "fact", "offenders"),
    [
        ([1, 1], "twice", [1]),
        ([2, 0], "outside", [0]),
        ([2, -1], "outside", [-1]),
        ([2, -(2**31)], "outside", [-(2**31)]),
        ([2, 2**31 - 1], "outside", [2**31 - 1]),
        ([2, "size + 1"], "outside", ["size + 1"]),
        ([2, "size"], "idle", ["size"]),
        (["size"] * 2, "idle", ["size"]),
    ],
)
def test_a_wrong_free_names_its_offenders_and_changes_nothing(
    size: int, taken: int, wrong: list, fact: str, offenders: list
):
    free_list = FreeList(size)
    free_list.alloc(taken)
    before = drain(free_list)

    def values(words: list) -> list[int]:
        return [{"size": size, "size + 1": size + 1}.get(word, word) for word in words]

    with pytest.raises(ContractError) as caught:
        free_list.free(ids(*values(wrong)))
    assert getattr(caught.value, fact) == values(offenders)
    assert "Nothing was freed" in str(caught.value)
    assert drain(free_list) == before
    free_list.free(ids(*range(taken, 0, -1)))
    assert free_list.num_free == size


@pytest.mark.parametrize("start", [-700, -5, 0, 402, 2**31 - 600])
def test_a_long_run_is_checked_like_any_ids(start: int):
    free_list = FreeList(1000)
    free_list.alloc(1000)
    with pytest.raises(ContractError):
        free_list.free(np.arange(start, start + 600, dtype=np.int64).astype(np.int32))
    assert free_list.num_free == 0
    free_list.free(np.arange(401, 1001, dtype=np.int32))
    assert drain(free_list) == list(range(401, 1001))


def test_a_long_run_with_a_free_id_inside_is_refused():
    free_list = FreeList(1000)
    free_list.alloc(900)
    free_list.free(ids(300))
    with pytest.raises(ContractError) as caught:
        free_list.free(np.arange(1, 801, dtype=np.int32))
    assert caught.value.idle == [300]
    assert free_list.num_free == 101


def test_ends_of_a_run_do_not_make_a_run():
    free_list = FreeList(1000)
    free_list.alloc(1000)
    false_run = np.arange(1, 601, dtype=np.int32)
    false_run[1:-1] = 5
    with pytest.raises(ContractError, match="named twice: 5"):
        free_list.free(false_run)
    assert free_list.num_free == 0


def test_a_long_listing_is_cut():
    with pytest.raises(ContractError, match=r"20 … \(50 in all\)"):
        FreeList(100).free(np.arange(1, 51, dtype=np.int32))


@pytest.mark.parametrize(
    "values", [np.array([1]), np.array([[1]], dtype=np.int32), np.array([1.0])]
)
def test_only_int32_vectors_are_ids(values: np.ndarray):
    free_list = FreeList(3)
    free_list.alloc(1)
    with pytest.raises(ContractError, match="int32"):
        free_list.free(values)


@given(st.lists(st.integers(1, 30), max_size=60))
def test_distinct_keeps_each_id_once(values: list[int]):
    free_list = FreeList(30)
    found = free_list.distinct(ids(*values)).tolist()
    assert sorted(found) == sorted(set(values))


def test_distinct_of_a_long_run_and_of_foreign_ids():
    free_list = FreeList(1000)
    run = np.arange(1, 901, dtype=np.int32)
    assert free_list.distinct(run) is run
    with pytest.raises(ContractError, match=r"outside 1…1000: 1001"):
        free_list.distinct(ids(3, 1001))


def test_restore_brings_back_the_order_and_can_be_repeated():
    free_list = FreeList(6)
    free_list.alloc(4)
    free_list.free(ids(3, 1))
    state = free_list.backup()
    for _ in range(2):
        free_list.alloc(3)
        free_list.free(ids(2))
        free_list.restore(state)
        assert drain(free_list) == [3, 1, 5, 6]
    with pytest.raises(ContractError):
        free_list.free(ids(3))


@pytest.mark.parametrize("state", [None, FreeList(5).backup()])
def test_a_foreign_backup_is_refused(state: object):
    with pytest.raises(ContractError, match="no backup of a list of 6 pages"):
        FreeList(6).restore(state)
