# SPDX-License-Identifier: Apache-2.0
"""The reference against formulas written differently: torch's fused call, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bedplate.contract import AttentionCallSpec
from bedplate.reference.attention import attend, visible
from bedplate.reference.ops import OPERATIONS, RMS_NORM_ORDERS
from bedplate.reference.runtime import TorchRuntime


def call(**changes):
    base = {
        "call_id": 0, "module": "m", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
        "value_dim": 8, "scale": 0.35,
    }  # fmt: skip
    return AttentionCallSpec(**{**base, **changes})


@pytest.mark.parametrize(
    ("changes", "seen_by_last"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"window": 3}, [3, 4, 5]),
        ({"window": 1}, [5]),
        ({"chunk": 4}, [4, 5]),
        ({"window": 3, "chunk": 2}, [4, 5]),
        ({"causal": False}, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_what_a_query_sees(changes, seen_by_last):
    mask = visible(torch.tensor([5]), torch.arange(7), call(**changes))
    assert mask[0].nonzero().flatten().tolist() == seen_by_last


def tensors(n, length, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 4, 8, generator=g),
        torch.randn(length, 2, 8, generator=g),
        torch.randn(length, 2, 8, generator=g),
    )


@pytest.mark.parametrize("changes", [{}, {"window": 3}, {"chunk": 4}], ids=str)
def test_it_is_the_fused_calls_formula(changes):
    spec = call(**changes)
    q, k, v = tensors(5, 9)
    mask = visible(torch.arange(4, 9), torch.arange(9), spec)
    fused = scaled_dot_product_attention(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
        attn_mask=mask, scale=spec.scale, enable_gqa=True,
    )[0].transpose(0, 1)  # fmt: skip
    torch.testing.assert_close(attend(q, k, v, mask, spec, None), fused)


def test_sinks_take_weight_and_give_nothing():
    q, k, v = tensors(1, 1)
    spec = call()
    mask = torch.ones(1, 1, dtype=torch.bool)
    scores = (q * k.repeat_interleave(2, 1)).sum(-1) * spec.scale
    weight = torch.sigmoid(scores - 1.5)  # two logits: the key's, and the sink's
    expected = weight[..., None] * v.repeat_interleave(2, 1)
    torch.testing.assert_close(attend(q, k, v, mask, spec, torch.full((4,), 1.5)), expected)


def test_soft_caps_bound_the_scores():
    q, k, v = tensors(1, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    tiny = attend(q * 1e3, k, v, mask, call(softcap=1e-6), None)
    torch.testing.assert_close(tiny, v.mean(0).repeat_interleave(2, 0)[None])


@pytest.mark.parametrize("order", RMS_NORM_ORDERS)
def test_norms_have_unit_mean_square_and_their_own_rounding(order):
    x = torch.randn(5, 64, dtype=torch.float64).to(torch.bfloat16)
    weight = None if order == "no_weight" else torch.full((64,), 0.5, dtype=torch.bfloat16)
    out = OPERATIONS["rms_norm"](x, weight, 0.0, order)
    scale = {"no_weight": 1.0, "one_plus_weight_fp32": 1.5}.get(order, 0.5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.float().pow(2).mean(-1).sqrt(), torch.full((5,), scale), atol=5e-3, rtol=0
    )


def test_the_runtime_of_the_host():
    runtime = TorchRuntime("cpu")
    assert runtime.device.type == "cpu"
    status = runtime.memory()
    assert 0 < status.free_bytes <= status.total_bytes
    event = runtime.record_event()
    event.synchronize()
    assert event.query()
    staging = runtime.empty_host(1000)
    assert staging.shape == (1000,)
    assert staging.data_ptr() % 64 == 0
    runtime.seed(7)
    first = torch.rand(1)
    runtime.seed(7)
    assert torch.equal(first, torch.rand(1))
    with runtime.inference_guard():
        assert not torch.is_grad_enabled()
    runtime.synchronize()
    runtime.empty_cache()
    runtime.shutdown()
