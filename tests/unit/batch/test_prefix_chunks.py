# SPDX-License-Identifier: Apache-2.0
"""Chunked prefixes: vectors V3, V4, V4b and the trap of function 53."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bedplate.batch.prefix_chunks import get_prefix_chunk_seq_lens, plan_prefix_chunks
from bedplate.errors import ConfigError


def i32(values):
    return torch.tensor(values, dtype=torch.int32)


def plan(prefixes, capacity):
    """Plan over a table whose row i holds the slots i · width, i · width + 1, …"""
    size, width = len(prefixes), max(prefixes, default=0) + 1
    table = torch.arange(max(size, 1) * width, dtype=torch.int32).reshape(-1, width)
    return plan_prefix_chunks(i32(prefixes), i32(range(size)), table, capacity=capacity)


def test_lengths_and_running_sums():
    """V3."""
    starts, lens = get_prefix_chunk_seq_lens(i32([100, 250, 300]), 3, 100)
    assert starts.tolist() == [[0] * 3, [100] * 3, [200] * 3]
    assert lens.tolist() == [[100, 100, 100], [0, 100, 100], [0, 50, 100]]
    assert (starts.dtype, lens.dtype) == (torch.int32, torch.int32)
    chunks = plan([100, 250, 300], 300)
    assert chunks.cu_seq_lens.tolist() == [
        [0, 100, 200, 300],
        [0, 0, 100, 200],
        [0, 0, 50, 150],
    ]
    assert (chunks.max_seq_lens, chunks.num_tokens) == ((100, 100, 100), (300, 200, 150))


def test_plan_gathers_the_slots_of_each_chunk():
    """V4."""
    table = torch.zeros((8, 5), dtype=torch.int32)
    table[3, :5] = torch.arange(40, 45)
    table[6, :2] = torch.arange(90, 92)
    chunks = plan_prefix_chunks(i32([5, 2, 0]), i32([3, 6, 1]), table, capacity=6)
    assert len(chunks) == 3
    assert chunks.starts.tolist() == [[0, 0, 0], [2, 2, 2], [4, 4, 4]]
    assert chunks.seq_lens.tolist() == [[2, 2, 0], [2, 0, 0], [1, 0, 0]]
    assert chunks.cu_seq_lens.tolist() == [[0, 2, 4, 4], [0, 2, 2, 2], [0, 1, 1, 1]]
    assert (chunks.max_seq_lens, chunks.num_tokens) == ((2, 2, 1), (4, 2, 1))
    assert [k.tolist() for k in chunks.kv_indices] == [[40, 41, 90, 91], [42, 43], [44]]
    tensors = (chunks.starts, chunks.seq_lens, chunks.cu_seq_lens, *chunks.kv_indices)
    assert {t.dtype for t in tensors} == {torch.int32}


def test_default_capacity():
    """V4b."""
    table = torch.zeros((3, 100_000), dtype=torch.int32)
    chunks = plan_prefix_chunks(i32([100_000, 50_000, 1]), i32([0, 1, 2]), table)
    assert chunks.seq_lens.tolist() == [[43690, 43690, 1], [43690, 6310, 0], [12620, 0, 0]]
    assert chunks.num_tokens == (87381, 50000, 12620)


@pytest.mark.parametrize("prefixes", [[], [0], [0, 0]])
def test_without_prefix_there_is_no_chunk(prefixes):
    chunks = plan(prefixes, 10)
    assert len(chunks) == 0
    assert chunks.starts.shape == (0, len(prefixes))
    assert chunks.kv_indices == chunks.max_seq_lens == ()


@pytest.mark.parametrize(("prefixes", "capacity"), [([1, 1, 1], 2), ([], 0)])
def test_more_requests_than_capacity_is_refused_with_both_numbers(prefixes, capacity):
    """Function 53 divided by zero here."""
    with pytest.raises(ConfigError, match=f"capacity is {capacity} .* has {len(prefixes)}"):
        plan(prefixes, capacity)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.integers(0, 30),
)
def test_chunks_cover_every_prefix_once_and_in_order(prefixes, spare):
    capacity = len(prefixes) + spare
    chunks = plan(prefixes, capacity)
    seen = [[] for _ in prefixes]
    width = max(prefixes) + 1
    for slots, cu in zip(chunks.kv_indices, chunks.cu_seq_lens.tolist(), strict=True):
        assert len(slots) <= capacity
        for i, (a, b) in enumerate(pairwise(cu)):
            seen[i] += slots[a:b].tolist()
    assert seen == [[i * width + c for c in range(n)] for i, n in enumerate(prefixes)]
