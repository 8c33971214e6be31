# SPDX-License-Identifier: Apache-2.0
"""Merging attention states: what its cases cannot say."""

from __future__ import annotations

import pytest
import torch

from bedplate.errors import ContractError
from bedplate_triton.cases.decode_attention import CALLS, call_options, draw, paged_cache
from bedplate_triton.extend_attention import extend_attention
from bedplate_triton.features import Features
from bedplate_triton.merge_states import merge_attention_states

FEATURES = Features(cores=4)


def states(device, *shape):
    return draw(device, 0, shape, torch.bfloat16), draw(device, 1, shape[:2], torch.float32)


def test_an_empty_side_leaves_the_other_bit_for_bit(device):
    out, lse = states(device, 5, 3, 24)
    nothing = torch.full_like(out, float("nan")), torch.full_like(lse, float("-inf"))
    for pair in ((out, lse, *nothing), (*nothing, out, lse)):
        merged, sums = merge_attention_states(*pair, features=FEATURES)
        assert torch.equal(merged, out)
        assert torch.equal(sums, lse)


def test_no_tokens_are_no_launch(device):
    state = states(device, 0, 3, 24)
    merged, sums = merge_attention_states(*state, *state, features=FEATURES)
    assert merged.shape == (0, 3, 24)
    assert sums.shape == (0, 3)


@pytest.mark.parametrize("name", ["softcap", "sinks"])
def test_a_prefix_and_the_rest_are_the_whole(name, device):
    """All queries see the first 64 keys; what follows is causal, and takes the sinks."""
    call, length, prefix = CALLS[name], 100, 64
    cache = paged_cache(device, 0, call, (length,), torch.float32, 4)
    pools, table = (cache["k_pool"], cache["v_pool"]), cache["req_to_token"]
    fresh = length - prefix
    q = draw(device, 1, (fresh, call.num_heads, call.head_dim), torch.float32)

    def attend(table, length, options, **more):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
        ints = ([1], [length], [0], [fresh])
        ints = (torch.tensor(each, dtype=torch.int32, device=device) for each in ints)
        extend_attention(
            q, *pools, table, *ints, out, lse, features=FEATURES, max_extend_len=fresh,
            **options, **more,
        )  # fmt: skip
        return out, lse

    options = call_options(device, 0, call)
    first = attend(table, prefix, options | {"sinks": None}, causal=False)
    rest = attend(table[:, prefix:], fresh, options)
    merged = merge_attention_states(*first, *rest, features=FEATURES)
    for got, want in zip(merged, attend(table, length, options), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_refuses_what_does_not_fit(device):
    out, lse = states(device, 5, 3, 24)
    with pytest.raises(ContractError, match="twice the same"):
        merge_attention_states(out, lse, out[:4], lse, features=FEATURES)
    with pytest.raises(ContractError, match="sums are float32"):
        merge_attention_states(out, lse.double(), out, lse, features=FEATURES)
    with pytest.raises(ContractError, match="adjacent"):
        merge_attention_states(out[..., ::2], lse, out[..., ::2], lse, features=FEATURES)
