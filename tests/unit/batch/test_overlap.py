# SPDX-License-Identifier: Apache-2.0
"""Two-batch overlap: vectors V14, V15 and its degenerate cases."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bedplate.batch.forward_mode import ForwardMode
from bedplate.batch.overlap import plan_overlap, split_decode, split_extend, split_non_padded
from bedplate.errors import ConfigError, UnsupportedError


@pytest.mark.parametrize(("size", "per_request", "seq", "token"), [(8, 1, 4, 4), (6, 4, 3, 12)])
def test_equal_requests_are_halved_by_count(size, per_request, seq, token):
    """V14."""
    plan = split_decode(size, tokens_per_request=per_request)
    assert (plan.seq_split, plan.token_split) == (seq, token)
    first, second = plan.children
    assert (first.requests, second.requests) == ((0, seq), (seq, size))
    assert (first.tokens, second.tokens) == ((0, token), (token, size * per_request))


def test_real_tokens_fall_into_the_first_half_first():
    """V14: n = 10 of two halves of 12."""
    assert split_non_padded(12, 10) == (10, 0)
    assert split_non_padded(4, 10) == (4, 6)


@pytest.mark.parametrize(
    ("lens", "two_chunk", "seq", "token", "first", "second", "growth"),
    [
        ([10, 20, 30, 40], True, 2, 50, [10, 20, 20], [10, 40], 20),
        ([10, 10, 10, 10], False, 2, 20, [10, 10], [10, 10], 0),
        ([100], True, 0, 50, [50], [50], 50),
        ([1, 99], True, 1, 50, [1, 49], [50], 49),
        ([25, 25, 50], False, 2, 50, [25, 25], [50], 0),
        ([3, 3, 3], True, 1, 4, [3, 1], [2, 3], 1),
        ([49, 2, 49], False, 2, 51, [49, 2], [49], 0),
    ],
)
def test_extend_vectors(lens, two_chunk, seq, token, first, second, growth):
    """V15, and of two equally good cuts the later one."""
    plan = split_extend(lens)
    assert (plan.two_chunk, plan.seq_split, plan.token_split) == (two_chunk, seq, token)
    assert [list(c.extend_seq_lens) for c in plan.children] == [first, second]
    assert [c.prefix_growth for c in plan.children] == [0, growth]


@pytest.mark.parametrize(("lens", "seq"), [([1, 2], 1), ([1, 1, 1], 1)])
def test_a_cut_on_a_boundary_leaves_no_empty_request(lens, seq):
    """V15's rule would end the first half with a request of zero tokens."""
    plan = split_extend(lens)
    assert (plan.two_chunk, plan.seq_split, plan.token_split) == (False, seq, 1)
    assert all(n > 0 for child in plan.children for n in child.extend_seq_lens)


@pytest.mark.parametrize("lens", [[], [0], [1], [1, 0]])
def test_fewer_than_two_tokens_are_not_split(lens):
    """V15's degenerate case: one half would be empty."""
    assert split_extend(lens) is None


@pytest.mark.parametrize("size", [0, 1])
def test_one_request_of_equal_tokens_is_not_split(size):
    assert split_decode(size) is None


def test_threshold_zero_never_cuts_a_request():
    assert not split_extend([1, 99], balance_threshold=0).two_chunk
    assert split_extend([100], balance_threshold=0) is None


@pytest.mark.parametrize("threshold", [-0.1, 0.51])
def test_impossible_threshold_is_refused(threshold):
    with pytest.raises(ConfigError, match=str(threshold)):
        split_extend([1, 2], balance_threshold=threshold)


def test_plan_dispatches_by_mode():
    assert plan_overlap(ForwardMode.DECODE, batch_size=8) == split_decode(8)
    assert plan_overlap(
        ForwardMode.TARGET_VERIFY, batch_size=6, tokens_per_request=4
    ) == split_decode(6, tokens_per_request=4)
    assert plan_overlap(
        ForwardMode.EXTEND, batch_size=2, extend_seq_lens=[4, 4]
    ) == split_extend([4, 4])


def test_an_idle_rank_takes_part_with_empty_halves():
    """Function 54: 0 is a legal split, not the absence of one."""
    plan = plan_overlap(ForwardMode.IDLE, batch_size=0)
    assert plan is not None
    assert (plan.seq_split, plan.token_split) == (0, 0)


@pytest.mark.parametrize(
    "mode", [ForwardMode.MIXED, ForwardMode.SPLIT_PREFILL, ForwardMode.DRAFT_EXTEND]
)
def test_other_modes_are_refused_by_name(mode):
    with pytest.raises(UnsupportedError, match=mode.name):
        plan_overlap(mode, batch_size=4)


@given(st.lists(st.integers(1, 60), max_size=12), st.sampled_from([0.3, 0.48, 0.5]))
def test_halves_are_a_balanced_partition(lens, threshold):
    plan = split_extend(lens, balance_threshold=threshold)
    if plan is None:
        assert sum(lens) < 2
        return
    first, second = (list(c.extend_seq_lens) for c in plan.children)
    joined = first + second
    if plan.two_chunk:
        joined = [*first[:-1], first[-1] + second[0], *second[1:]]
        assert plan.children[1].prefix_growth == first[-1]
    assert joined == lens
    assert min(first + second) > 0
    assert [(b - a) for a, b in (c.tokens for c in plan.children)] == [sum(first), sum(second)]
    assert [(b - a) for a, b in (c.requests for c in plan.children)] == [
        len(first),
        len(second),
    ]
    assert min(sum(first), sum(second)) >= min(threshold * sum(lens), sum(lens) // 2)
