# SPDX-License-Identifier: Apache-2.0
"""Splits of keys in decode: vector V17."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bedplate.attention.splits import num_kv_splits


def splits(lens, heads=32, kv_heads=8, cores=132, **options):
    got = num_kv_splits(
        np.array(lens, np.int32), num_heads=heads, num_kv_heads=kv_heads, cores=cores, **options
    )
    assert got.dtype == np.int32
    return got.tolist()


@pytest.mark.parametrize(
    ("lens", "kv_heads", "expected"),
    [([64, 512], 8, [1, 8]), ([4096] * 64, 8, [2] * 64), ([100, 110], 32, [3, 3])],
)
def test_vectors(lens, kv_heads, expected):
    """V17."""
    assert splits(lens, kv_heads=kv_heads) == expected


def test_lengths_within_a_quarter_are_treated_as_equal():
    assert splits([100, 110], cores=1) == [1, 1]
    assert splits([80, 110], cores=1) == [2, 2]


def test_unknown_core_count_cuts_fully():
    assert splits([5, 500], cores=None) == [8, 8]


@pytest.mark.parametrize("cores", [None, 132])
def test_empty_batch(cores):
    assert splits([], cores=cores) == []


def test_requests_without_keys_count_as_one_split():
    """Padding rows may have length 0, which the heuristic would divide by."""
    assert splits([0, 0]) == [1, 1]
    assert splits([0, 4096])[0] == 1


@given(
    st.lists(st.integers(0, 200_000), max_size=20),
    st.sampled_from([(32, 32), (32, 8), (64, 1), (5, 5)]),
    st.integers(1, 300),
    st.sampled_from([1, 8, 16]),
    st.integers(1, 5),
)
def test_splits_stay_within_bounds_and_grow_with_length(lens, heads, cores, most, queries):
    got = splits(lens, *heads, cores=cores, max_splits=most, queries_per_request=queries)
    assert all(1 <= n <= most for n in got)
    assert [n for _, n in sorted(zip(lens, got, strict=True))] == sorted(got)
