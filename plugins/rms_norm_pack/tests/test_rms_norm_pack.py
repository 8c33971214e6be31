# SPDX-License-Identifier: Apache-2.0
"""Runs where the pack is installed beside bedplate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bedplate.config import EngineConfig
from bedplate.contract import OpRequest
from bedplate.reference.ops import OPERATIONS, RMS_NORM_ORDERS
from bedplate.registry import DecisionLog, open_backend, survey

plugin = pytest.importorskip("bedplate_rms_norm_pack.plugin")


def test_a_pack_is_thirty_lines_of_code():
    text = Path(plugin.__file__).read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines()]
    assert sum(bool(line) and not line.startswith(("#", '"""')) for line in lines) <= 30


def test_comes_through_the_door():
    (record,) = [r for r in survey(probe=False).records if r.name == "rms_norm_pack"]
    assert (record.kind, record.distribution) == ("kernels", "bedplate-rms-norm-pack")
    assert record.usable, record.reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("order", RMS_NORM_ORDERS)
def test_what_is_claimed_is_bitwise_the_reference(dtype, order):
    answer = plugin.supports(OpRequest(op="rms_norm", dtype=dtype, attributes={"order": order}))
    if not answer:
        assert order in answer.reason
        assert order in ("one_plus_weight_fp32", "weight_after_cast")
        return
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 3, 160, generator=generator).to(getattr(torch, dtype)) * 3
    weight = torch.randn(160, generator=generator).to(x.dtype) if order != "no_weight" else None
    got = plugin.rms_norm(x, weight, 1e-6, order)
    assert torch.equal(got, OPERATIONS["rms_norm"](x, weight, 1e-6, order))


def test_overrides_the_backend_where_it_may():
    decisions = DecisionLog()
    bound = open_backend(
        config=EngineConfig(backend="cpu"), reference_ops=OPERATIONS, decisions=decisions
    )
    try:
        ask = {"order": "weight_fp32"}
        chosen = bound.ops.choose(OpRequest(op="rms_norm", dtype="float32", attributes=ask))
        other = bound.ops.choose(OpRequest(op="rms_norm", dtype="float32"))
    finally:
        bound.shutdown()
    assert chosen.provider == "rms_norm_pack"
    assert other.provider == "reference"
    assert "pack.rms_norm_pack" in decisions.points()
    assert not decisions.unexplained()
