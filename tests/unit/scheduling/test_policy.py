# SPDX-License-Identifier: Apache-2.0
"""Order of requests, and where prompts are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bedplate.scheduling.policy import chunk_end, pages_for, rank


def test_urgent_first_then_in_order_of_arrival():
    requests = [(0, 1), (2, 5), (0, 3), (2, 4), (-1, 2)]
    assert sorted(requests, key=lambda r: rank(*r)) == [(2, 4), (2, 5), (0, 1), (0, 3), (-1, 2)]


@pytest.mark.parametrize(
    ("start", "total", "budget", "page", "end"),
    [
        (0, 10, 10, 4, 10),  # all of it fits
        (0, 10, 9, 4, 8),  # cut at a page
        (8, 10, 2, 4, 10),  # the rest, smaller than a page
        (8, 100, 3, 4, 8),  # not one page
        (0, 100, 0, 4, 0),
        (0, 100, -5, 4, 0),
        (16, 100, 7, 1, 23),
    ],
)
def test_chunk_end(start, total, budget, page, end):
    assert chunk_end(start, total, budget, page) == end


@given(
    start=st.integers(0, 50), more=st.integers(0, 200), budget=st.integers(-10, 200),
    page=st.integers(1, 32),
)  # fmt: skip
def test_chunks_stay_in_budget_and_end_at_pages(start, more, budget, page):
    start, total = start * page, start * page + more
    end = chunk_end(start, total, budget, page)
    assert start <= end <= total
    assert end - start <= max(budget, 0)
    assert end == total or end % page == 0
    if budget >= page and more:
        assert end > start


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_pages_for(tokens, pages):
    assert pages_for(tokens, 16) == pages
