# SPDX-License-Identifier: Apache-2.0
"""Rows of logits: vector V16."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bedplate.batch.logits_rows import select_logits_rows


def select(ext, start=None, **options):
    start = None if start is None else np.array(start, np.int32)
    got = select_logits_rows(np.array(ext, np.int32), start, **options)
    assert {a.dtype for a in (got.rows, got.sample, got.prompt)} == {np.dtype(np.int64)}
    return got.rows.tolist(), got.sample.tolist(), got.prompt.tolist()


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (None, ([3, 6], [0, 1], [])),
        ([-1, -1], ([3, 6], [0, 1], [])),
        ([2, 3], ([2, 3, 6], [1, 2], [0, 1])),
        ([0, 1], ([0, 1, 2, 3, 5, 6], [3, 5], [0, 1, 2, 3, 4, 5])),
        ([-1, 1], ([3, 5, 6], [0, 2], [1, 2])),
        ([9, 2], ([3, 6], [0, 1], [1])),
    ],
)
def test_rows_of_two_requests(start, expected):
    """V16."""
    assert select([4, 3], start) == expected


def test_static_stride_finds_the_last_used_row():
    """V16."""
    assert select([2, 3], static_stride=5) == ([1, 7], [0, 1], [])


def test_empty_batch_has_no_rows():
    assert select([]) == ([], [], [])


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(-1, 10)), max_size=12))
def test_each_request_samples_its_last_token(requests):
    ext = [e for e, _ in requests]
    rows, sample, prompt = select(ext, [s for _, s in requests])
    assert [rows[i] for i in sample] == [sum(ext[: i + 1]) - 1 for i in range(len(ext))]
    assert rows == sorted(set(rows))
    assert len(prompt) == sum(max(e - s, 0) for e, s in requests if s >= 0)
