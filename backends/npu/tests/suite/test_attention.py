# SPDX-License-Identifier: Apache-2.0
"""Attention of every kind of pass, against the reference."""

from __future__ import annotations

import pytest
import torch

from bedplate.batch.forward_mode import ForwardMode
from bedplate_npu import ops
from bedplate_npu.selftest import SideBySide, call_of

pytestmark = pytest.mark.npu_silicon

EXTEND, DECODE = ForwardMode.EXTEND, ForwardMode.DECODE
LATENT = {"num_kv_heads": 1, "head_dim": 576, "value_dim": 512, "value_in_key": True}
CALLS = {
    "grouped": {},
    "one key head": {"num_kv_heads": 1},
    "heads of 128": {"head_dim": 128, "value_dim": 128},
    "heads of 192 and 128": {"head_dim": 192, "value_dim": 128},
    "heads of 80, without a packed form": {"head_dim": 80, "value_dim": 80},
    "heads of 256, without a packed form": {"head_dim": 256, "value_dim": 256},
    "window": {"window": 70},
    "window of a size without a packed form": {"head_dim": 80, "value_dim": 80, "window": 70},
    "window of one": {"window": 1},
    "sinks": {"sinks": True},
    "sinks and window": {"sinks": True, "window": 70},
    "latents": LATENT,
    "latents of three heads": LATENT | {"num_heads": 3},
}
STEPS = (
    ((130, 5), EXTEND),
    ((3, 20), ForwardMode.MIXED),
    ((1, 1), DECODE),
    ((4, 4), ForwardMode.TARGET_VERIFY),
    ((2, 0), EXTEND),
    ((1, 1), DECODE),
)


@pytest.mark.parametrize("changes", CALLS.values(), ids=CALLS)
def test_every_pass_agrees_with_the_reference(runtime, changes):
    both = SideBySide(runtime, [call_of(**changes)])
    for counts, mode in STEPS:
        assert both.step(counts, mode) < 2e-2, (counts, mode)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(runtime, dtype):
    both = SideBySide(runtime, [call_of()], dtype=dtype)
    assert both.step((9, 30), EXTEND) < 2e-2
    assert both.step((1, 1), DECODE) < 2e-2


def test_a_call_reads_what_another_stored(runtime):
    both = SideBySide(runtime, [call_of(), call_of(1)])
    reader = call_of(1, alias_of=0)
    both.step((130, 5), EXTEND)
    device, host = both.batches((1, 1), DECODE)
    both.attention.prepare(device)
    both.attention.prepare_in_graph(device)
    q, k, v, _ = both.draw(call_of(), 2)
    both.attend(both.attention, call_of(), device, (q, k, v, None))
    both.attend_reference(call_of(), host, (q, k, v, None))
    got = both.attend(both.attention, reader, device, (q, None, None, None)).float().cpu()
    want = both.attend_reference(reader, host, (q, None, None, None))
    assert (got - want).abs().max() < 2e-2 * want.abs().max()


def test_the_longest_request_fills_its_row_of_pages(runtime):
    both = SideBySide(runtime, [call_of()], requests=1, pages=2)
    assert both.step((2 * ops.PAGE_SIZE - 1,), EXTEND) < 2e-2
    assert both.step((1,), DECODE) < 2e-2


def test_operators_agree_with_the_reference(runtime):
    from bedplate.reference import ops as reference
    from bedplate.reference.rope import HeadNorm, RopeTable, qk_norm_rope_write

    chance = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=chance).to(torch.bfloat16)

    def near(got, want):
        return (got.float().cpu() - want.float()).abs().max() < 2e-2 * want.abs().max()

    place = runtime.device
    x, residual, weight = draw(5, 64), draw(5, 64), draw(64)
    for order in ("weight_fp32", "one_plus_weight_fp32"):
        args = (weight, 1e-5, order)
        got = ops.rms_norm(x.to(place), weight.to(place), 1e-5, order)
        assert near(got, reference.rms_norm(x, *args))
        pair = ops.add_norm(
            x.to(place), residual.to(place), weight.to(place), None, 1e-5, order
        )
        wanted = reference.add_norm(x, residual, weight, None, 1e-5, order)
        assert near(pair[0], wanted[0])
        assert near(pair[1], wanted[1])
    assert near(ops.act_and_mul(x.to(place), "silu"), reference.act_and_mul(x, "silu"))
    alone = ops.add_norm(x.to(place), None, weight.to(place), None, 1e-5, "weight_fp32")
    assert near(alone[0], reference.rms_norm(x, weight, 1e-5, "weight_fp32"))
    for style in ("half", "interleaved"):
        table = RopeTable(cos=draw(9, 16), sin=draw(9, 16), style=style)
        norm = HeadNorm(q_weight=draw(64), k_weight=draw(64), eps=1e-5, order="weight_fp32")
        q, k, v = draw(3, 4, 64), draw(3, 2, 64), draw(3, 2, 64)
        at = torch.tensor([8, 2, 5])
        slots = torch.tensor([130, 0, 200], dtype=torch.int32)
        there = [t.to(place) for t in (q, k, v, at)]
        pools = [torch.zeros(384, 2, 64, dtype=torch.bfloat16) for _ in range(2)]
        moved = [pool.to(place) for pool in pools]
        on = {"cos": table.cos.to(place), "sin": table.sin.to(place), "style": style}
        weights = {"q_weight": norm.q_weight.to(place), "k_weight": norm.k_weight.to(place)}
        device_norm = HeadNorm(**weights, eps=1e-5, order="weight_fp32")
        ops.qk_norm_rope_write(*there, RopeTable(**on), device_norm, *moved, slots.to(place))
        qk_norm_rope_write(q, k, v, at, table, norm, *pools, slots)
        for got, want in ((there[0], q), (there[1], k), (moved[0][128:], pools[0][128:])):
            assert near(got, want)
