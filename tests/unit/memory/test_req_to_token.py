# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bedplate.errors import ContractError
from bedplate.memory.req_to_token import ReqToTokenPool


def test_row_zero_is_for_padding():
    pool = ReqToTokenPool(3, 8)
    assert pool.alloc(3).tolist() == [1, 2, 3]
    with pytest.raises(ContractError) as caught:
        pool.free(np.array([1, 0]))
    assert caught.value.outside == [0]
    assert pool.available_size == 0


def test_all_or_nothing():
    pool = ReqToTokenPool(3, 8)
    pool.alloc(2)
    assert pool.alloc(2) is None
    assert pool.available_size == 1


def test_a_double_free_is_refused_whole():
    pool = ReqToTokenPool(4, 8)
    rows = pool.alloc(3)
    pool.free(2)
    with pytest.raises(ContractError, match="already free: 2"):
        pool.free(rows)
    assert pool.available_size == 2
    with pytest.raises(ContractError, match="named twice: 3"):
        pool.free([3, 3])
    pool.free([1, 3])
    assert pool.available_size == 4


def test_write_reaches_the_host_table_only_where_the_device_has_its_own():
    pool = ReqToTokenPool(2, 4)
    pool.write(1, slice(0, 3), np.array([5, 6, 7], dtype=np.int32))
    pool.write(np.array([1, 2]), np.array([3, 0]), np.array([8, 9], dtype=np.int32))
    assert pool.table.tolist() == [[0, 0, 0, 0], [5, 6, 7, 8], [9, 0, 0, 0]]
    assert pool.req_to_token.dtype == torch.int32
    assert not pool.req_to_token.any()


def test_a_unified_device_reads_the_host_table():
    pool = ReqToTokenPool(2, 4, unified=True)
    pool.write(2, 1, 11)
    assert pool.req_to_token[2].tolist() == [0, 11, 0, 0]
    assert pool.req_to_token.data_ptr() == pool.table.ctypes.data


def test_the_table_lies_where_it_is_told():
    pool = ReqToTokenPool(2, 4, torch.device("meta"))
    assert pool.req_to_token.device.type == "meta"
    assert tuple(pool.req_to_token.shape) == (3, 4)


def test_beyond_the_table_is_an_error():
    with pytest.raises(IndexError):
        ReqToTokenPool(2, 4).write(3, 0, 1)


@pytest.mark.parametrize(("size", "length"), [(0, 4), (4, 0)])
def test_sizes_below_one_are_refused(size: int, length: int):
    with pytest.raises(ContractError, match="at least 1"):
        ReqToTokenPool(size, length)


def test_clear_frees_every_row():
    pool = ReqToTokenPool(3, 4)
    pool.alloc(3)
    pool.clear()
    assert pool.alloc(3).tolist() == [1, 2, 3]


@given(st.lists(st.one_of(st.integers(1, 6), st.just("free")), max_size=30))
def test_rows_are_never_shared_or_lost(acts: list):
    pool = ReqToTokenPool(12, 2)
    held: list[list[int]] = []
    for act in acts:
        if act == "free":
            if held:
                pool.free(np.array(held.pop(0), dtype=np.int32))
            continue
        rows = pool.alloc(act)
        assert (rows is None) == (act > 12 - sum(map(len, held)))
        if rows is not None:
            held.append(rows.tolist())
        taken = [row for rows in held for row in rows]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(range(1, 13))
        assert pool.available_size == 12 - len(taken)
