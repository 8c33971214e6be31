# SPDX-License-Identifier: Apache-2.0
"""Ranks, groups and gather predicates: vectors V10, V22 and functions 17, 9."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bedplate.errors import ConfigError, InternalError
from bedplate.parallel.layout import (
    AttentionLayout,
    ParallelLayout,
    attention_layout,
    enable_num_token_non_padded,
    local_non_padded_tokens,
    needs_attn_tp_gather,
    needs_gathered_buffer,
    needs_mlp_sync,
    needs_mlp_tp_gather,
)


def test_rank_5_of_8_in_4_groups():
    """V22."""
    assert attention_layout(5, 8, 4) == AttentionLayout(tp_size=2, tp_rank=1, dp_rank=2)


@given(st.integers(1, 8), st.integers(1, 8))
def test_every_place_is_taken_once(size, groups):
    places = {attention_layout(r, size * groups, groups) for r in range(size * groups)}
    assert {(p.dp_rank, p.tp_rank) for p in places} == set(product(range(groups), range(size)))


@pytest.mark.parametrize(
    ("rank", "tp", "dp"), [(0, 8, 3), (0, 0, 1), (0, 1, 0), (8, 8, 1), (-1, 8, 1)]
)
def test_impossible_places_are_refused(rank, tp, dp):
    with pytest.raises(ConfigError):
        attention_layout(rank, tp, dp)


def test_dense_layers_run_on_one_rank_or_all():
    with pytest.raises(ConfigError, match="moe_dense_tp is 2"):
        ParallelLayout(tp_size=4, moe_dense_tp=2)
    with pytest.raises(ConfigError, match="3 attention groups"):
        ParallelLayout(tp_size=4, dp_size=3)


def layout(**changes):
    return ParallelLayout(**{"tp_size": 4, **changes})


DP = {"dp_attention": True, "dp_size": 2}
ALONE = {"moe_dense_tp": 1, "dp_lm_head": True, "moe_all_to_all": True}


@pytest.mark.parametrize(
    ("changes", "mlp", "attn", "sync"),
    [
        ({}, False, False, False),
        (DP, True, False, True),
        ({**DP, "moe_dense_tp": 1, "dp_lm_head": True}, True, True, True),
        ({**DP, "moe_dense_tp": 1, "moe_all_to_all": True}, True, True, True),
        ({**DP, "dp_lm_head": True, "moe_all_to_all": True}, True, True, True),
        ({**DP, **ALONE}, False, True, True),
        ({**DP, **ALONE, "dp_size": 4}, False, False, True),
        ({"moe_all_to_all": True}, False, True, True),
        ({"moe_dense_tp": 1}, False, True, True),
    ],
)
def test_who_gathers(changes, mlp, attn, sync):
    """§6.2, gather predicates."""
    place = layout(**changes)
    assert needs_mlp_tp_gather(place) is mlp
    assert needs_attn_tp_gather(place) is attn
    assert needs_gathered_buffer(place) is (mlp or attn)
    assert needs_mlp_sync(place) is sync


@pytest.mark.parametrize(("experts", "expected"), [(1, False), (2, True)])
def test_experts_split_over_ranks_must_know_the_padding(experts, expected):
    """Function 17."""
    assert enable_num_token_non_padded(layout(moe_ep_size=experts)) is expected


def shares(n, size, ranks, k=1):
    return [
        local_non_padded_tokens(
            n, padded_batch_size=size, attn_tp_size=ranks, attn_tp_rank=r, tokens_per_request=k
        )
        for r in range(ranks)
    ]


def test_real_rows_fill_the_first_ranks_first():
    """V10."""
    assert shares(5, 8, 4) == [2, 2, 1, 0]


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4), st.data())
def test_no_real_row_is_lost(ranks, share, k, data):
    n = data.draw(st.integers(0, ranks * share * k))
    assert sum(shares(n, ranks * share, ranks, k)) == n


def test_unequal_shares_are_our_own_mistake():
    with pytest.raises(InternalError, match=r"batch of 6 .* 4 ranks"):
        shares(5, 6, 4)
