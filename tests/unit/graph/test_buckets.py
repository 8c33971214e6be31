# SPDX-License-Identifier: Apache-2.0
"""Sizes to capture: vectors V7, V8 and the traps of function 6."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bedplate.errors import ConfigError
from bedplate.graph.buckets import (
    capture_sizes,
    compile_sizes,
    memory_class,
    pad_to,
    padded_seq_lens_sum,
)

GIB = 1 << 30
MANY = 4096


@pytest.mark.parametrize(
    ("options", "count", "largest"),
    [
        ({}, 23, 160),
        ({"memory": "large"}, 35, 256),
        ({"memory": "largest"}, 51, 512),
        ({"speculative": True}, 29, 160),
        ({"padding": False}, 40, 160),
    ],
)
def test_default_lists(options, count, largest):
    """V7."""
    sizes = capture_sizes(MANY, **options)
    assert (len(sizes), sizes[-1]) == (count, largest)
    assert sizes == tuple(sorted(set(sizes)))


@pytest.mark.parametrize(
    ("gib", "expected"), [(80, "standard"), (141, "large"), (192, "largest")]
)
def test_memory_class(gib, expected):
    assert memory_class(gib * GIB) == expected


@pytest.mark.parametrize(
    ("pool", "options", "expected"),
    [
        (10, {}, (1, 2, 4, 8, 10)),
        (30, {"memory": "largest"}, (1, 2, 4, 8, 16, 24, 30)),
        (5, {"sizes": [1, 3, 7]}, (1, 3, 5)),
        (MANY, {"sizes": [7, 1, 3, 3]}, (1, 3, 7)),
        (MANY, {"overlap": True, "gather_tp_size": 4, "limit": 64}, tuple(range(8, 65, 8))),
        (10, {"gather_tp_size": 4}, (4, 8)),
    ],
)
def test_vectors(pool, options, expected):
    """V7, V8."""
    assert capture_sizes(pool, **options) == expected


def test_the_pool_size_is_captured_below_a_larger_limit():
    """V7: P = 100, limit 128."""
    assert capture_sizes(100, limit=128)[-2:] == (96, 100)


@pytest.mark.parametrize(
    ("limit", "tail"), [(20, (8, 16, 20)), (300, (272, 288, 300)), (160, (152, 160))]
)
def test_a_limit_is_reached_exactly(limit, tail):
    """Function 6 stepped by 16 and ended at 16 and 288; we capture the limit as well."""
    assert capture_sizes(MANY, limit=limit)[-len(tail) :] == tail


def test_sizes_appended_up_to_a_limit_are_aligned_too():
    """Function 6 did not filter what it appended."""
    sizes = capture_sizes(MANY, limit=300, gather_tp_size=32)
    assert sizes == (32, 64, 96, 128, 160, 192, 224, 256, 288)


def test_the_largest_aligned_batch_within_the_pool_is_captured():
    """V8's P = 15 with alignment 4 used to end at 8."""
    assert capture_sizes(15, gather_tp_size=4) == (4, 8, 12)


@pytest.mark.parametrize(
    ("pool", "options", "numbers"),
    [
        (MANY, {"gather_tp_size": 8, "limit": 4}, "multiple of 8 .* at most 4 "),
        (3, {"gather_tp_size": 4}, "multiple of 4 .* at most 3 "),
        (0, {}, "multiple of 1 .* at most 0 "),
    ],
)
def test_nothing_left_is_a_config_error_with_the_numbers(pool, options, numbers):
    """V8, function 6: an empty list reached max(), and an assert without a word."""
    with pytest.raises(ConfigError, match=numbers):
        capture_sizes(pool, **options)


@pytest.mark.parametrize(
    "options", [{"sizes": []}, {"sizes": [0, 4]}, {"sizes": [-1]}, {"limit": 0}, {"limit": -3}]
)
def test_sizes_below_one_are_refused(options):
    with pytest.raises(ConfigError, match="at least 1"):
        capture_sizes(8, **options)


def test_the_users_list_is_not_changed():
    """Function 6 appended to the very list of the settings."""
    user = [1, 3, 7]
    capture_sizes(5, sizes=user, limit=4)
    assert user == [1, 3, 7]


def test_a_limit_below_every_given_size_is_captured_itself():
    assert capture_sizes(MANY, sizes=[8, 16], limit=4) == (4,)


@given(
    st.integers(1, 600),
    st.none() | st.integers(1, 600),
    st.none() | st.lists(st.integers(1, 600), min_size=1, max_size=9),
    st.sampled_from([1, 2, 8]),
    st.booleans(),
)
def test_every_size_is_admissible_and_limits_are_reached(pool, limit, user, ranks, overlap):
    step = ranks * (2 if overlap else 1)
    bound = min(pool, limit or pool)
    try:
        sizes = capture_sizes(
            pool, limit=limit, sizes=user, gather_tp_size=ranks, overlap=overlap
        )
    except ConfigError:
        candidates = user or [step]
        assert bound < step or all(size % step for size in candidates)
        return
    assert all(0 < size <= bound and size % step == 0 for size in sizes)
    assert sizes == tuple(sorted(set(sizes)))
    if limit is not None:
        assert sizes[-1] == bound // step * step


def test_only_small_sizes_are_compiled():
    assert compile_sizes((1, 8, 32, 40)) == (1, 8, 32)
    assert compile_sizes((1, 8), limit=4) == (1,)


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 1), (3, 4), (5, 8), (9, 16), (17, 24), (160, 160), (161, None)]
)
def test_padding_picks_the_next_size(size, expected):
    """§6.6."""
    assert pad_to(size, capture_sizes(MANY)) == expected


def test_padding_rows_add_their_fill_length():
    """§6.6: 5 requests in a graph of 8."""
    got = padded_seq_lens_sum(100, batch_size=5, padded_batch_size=8, fill_value=1)
    assert got == 103
