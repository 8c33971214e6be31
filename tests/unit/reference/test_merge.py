# SPDX-License-Identifier: Apache-2.0
"""Merging attention states: vector V5 and empty sides."""

from __future__ import annotations

import math

import pytest
import torch

from bedplate.reference.merge import merge_attention_states

EMPTY = -math.inf


def state(value, lse):
    return torch.full((1, 1, 2), value), torch.full((1, 1), lse)


def test_outputs_are_weighted_by_their_sums():
    """V5."""
    out, lse = merge_attention_states(*state(1.0, 0.0), *state(3.0, math.log(3)))
    torch.testing.assert_close(out, torch.full((1, 1, 2), 2.5))
    torch.testing.assert_close(lse, torch.full((1, 1), 1.386294))


@pytest.mark.parametrize("garbage", [0.0, math.nan, math.inf])
def test_an_empty_side_leaves_the_other_unchanged(garbage):
    """V5: bit for bit, whatever the empty side's output holds."""
    full = state(0.1, -700.3)
    for pair in ((*full, *state(garbage, EMPTY)), (*state(garbage, EMPTY), *full)):
        out, lse = merge_attention_states(*pair)
        assert torch.equal(out, full[0])
        assert torch.equal(lse, full[1])


def test_two_empty_sides_give_zeros_not_nan():
    out, lse = merge_attention_states(*state(math.nan, EMPTY), *state(0.0, EMPTY))
    assert out.tolist() == [[[0.0, 0.0]]]
    assert lse.item() == EMPTY


def test_keeps_the_output_dtype():
    out, lse = merge_attention_states(
        torch.ones(1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 1),
        torch.ones(1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 1),
    )  # fmt: skip
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("cut", [0, 1, 5, 12])
def test_equals_attention_over_the_union(cut):
    torch.manual_seed(0)
    scores, values = torch.randn(4, 3, 12) * 20, torch.randn(12, 3, 5)

    def attend(keys):
        part = scores[:, :, keys]
        weights = torch.nan_to_num(torch.softmax(part, -1))
        return torch.einsum("thk,khd->thd", weights, values[keys]), torch.logsumexp(part, -1)

    out, lse = merge_attention_states(*attend(slice(None, cut)), *attend(slice(cut, None)))
    expected, expected_lse = attend(slice(None))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
