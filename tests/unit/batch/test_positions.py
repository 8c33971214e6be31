# SPDX-License-Identifier: Apache-2.0
"""Positions of new tokens: vectors V1, V2, V6 and the traps of functions 18–22."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bedplate.batch.positions import (
    clamp_position,
    compute_position,
    mrope_positions,
    positions_cpu,
)

VECTORS = [
    ([3, 0, 5], [2, 4, 1], [3, 4, 0, 1, 2, 3, 5], [0, 2, 6]),
    ([1, 9, 0], [2, 0, 1], [1, 2, 0], [0, 2, 2]),
    ([], [], [], []),
    ([7, 7], [0, 0], [], [0, 0]),
]


def i32(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize(("prefix", "ext", "positions", "starts"), VECTORS)
def test_positions_match_the_vectors_on_device_and_host(prefix, ext, positions, starts):
    """V1; an empty batch and rows without tokens are legal (function 21's `cat` raises)."""
    got, got_starts = compute_position(
        torch.tensor(prefix, dtype=torch.int32), torch.tensor(ext, dtype=torch.int32), sum(ext)
    )
    assert (got.tolist(), got_starts.tolist()) == (positions, starts)
    assert (got.dtype, got_starts.dtype) == (torch.int64, torch.int32)
    host, host_starts = positions_cpu(i32(*prefix), i32(*ext))
    assert (host.tolist(), host_starts.tolist()) == (positions, starts)
    assert (host.dtype, host_starts.dtype) == (np.int64, np.int32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_start_loc_is_int32_whatever_the_lengths_are(dtype):
    """Function 18: start_loc took the dtype of its input in one of the two versions."""
    _, starts = compute_position(None, torch.tensor([2, 1], dtype=dtype), 3)
    assert starts.dtype == torch.int32


def test_no_prefix_tensor_means_no_prefix():
    positions, _ = compute_position(None, torch.tensor([2, 3], dtype=torch.int32), 5)
    assert positions.tolist() == [0, 1, 0, 1, 2]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=30))
def test_every_request_counts_on_from_its_prefix(rows):
    prefix, ext = [r[0] for r in rows], [r[1] for r in rows]
    expected = [p + j for p, e in rows for j in range(e)]
    positions, starts = compute_position(
        torch.tensor(prefix, dtype=torch.int32), torch.tensor(ext, dtype=torch.int32), sum(ext)
    )
    assert positions.tolist() == expected
    assert starts.tolist() == [sum(ext[:i]) for i in range(len(ext))]


def test_positions_do_not_read_device_data():
    """Function 21 read device tensors once per request; without data (meta) it would fail."""
    lens = torch.empty(4, dtype=torch.int32, device="meta")
    positions, starts = compute_position(lens, lens, 9)
    assert (positions.shape, starts.shape) == ((9,), (4,))


def test_clamp_position_never_goes_below_zero():
    """V2."""
    got = clamp_position(torch.tensor([1, 5, 0], dtype=torch.int32))
    assert got.tolist() == [0, 4, 0]
    assert got.dtype == torch.int64


@pytest.mark.parametrize(("delta", "expected"), [(-3, 6), (0, 9)])
def test_mrope_decode_is_the_last_position_plus_delta(delta, expected):
    """V6, decode with seq_len 10."""
    got = mrope_positions(i32(9), i32(1), np.array([delta]))
    assert got.tolist() == [[expected]] * 3
    assert got.dtype == np.int64


def test_mrope_text_only_rows_are_identical():
    """V6, extend."""
    assert mrope_positions(i32(4), i32(3), np.array([0])).tolist() == [[4, 5, 6]] * 3


def test_mrope_joins_requests_by_column_and_reads_the_table_from_the_prefix_on():
    """V6. The rule knows no mode, so a split prefill cannot be missing from it."""
    table = np.arange(30).reshape(3, 10) * 10
    got = mrope_positions(i32(4, 2), i32(3, 2), np.array([0, 0]), [table, None])
    assert got.tolist() == [[r * 100 + c for c in (40, 50, 60)] + [2, 3] for r in range(3)]


def test_mrope_beyond_the_table_counts_on_with_delta():
    table = np.array([[0, 5, 6], [0, 7, 8], [0, 9, 10]])
    got = mrope_positions(i32(2), i32(3), np.array([8]), [table])
    assert got.tolist() == [[6, 11, 12], [8, 11, 12], [10, 11, 12]]


def test_mrope_of_an_empty_batch_has_three_rows():
    assert mrope_positions(i32(), i32(), np.array([], np.int64)).shape == (3, 0)
