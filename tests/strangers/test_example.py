# SPDX-License-Identifier: Apache-2.0
"""The tutorial's backend: small, right, and the template with two files more."""

from __future__ import annotations

import sys

import pytest
import torch
from tests.architecture.tree import ROOT
from tests.integration.parity.story import run_story

from bedplate import template
from bedplate.contract import AttentionRequest, OpRequest
from bedplate.models.probe import probe
from bedplate.reference.ops import RMS_NORM_ORDERS, rms_norm
from bedplate.testing.tiny_models import FAMILIES, family, tiny_model

EXAMPLE = ROOT / "examples" / "acme"
GROWN = {"bedplate_acme/plugin.py"}
ADDED = {"bedplate_acme/ops.py", "bedplate_acme/attention.py"}
MOST_LINES = 400


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield
    for name in [name for name in sys.modules if name.startswith("bedplate_acme")]:
        del sys.modules[name]


def text(path):
    return path.read_text(encoding="utf-8").removeprefix(
        "# SPDX-License-Identifier: Apache-2.0\n"
    )


def test_it_is_the_template_grown():
    files = template.render("acme")
    mine = {
        str(path.relative_to(EXAMPLE)): text(path)
        for path in EXAMPLE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert set(mine) == set(files) | ADDED
    assert {p: t for p, t in mine.items() if p not in GROWN | ADDED} == {
        p: t for p, t in files.items() if p not in GROWN
    }
    lines = iter(mine["bedplate_acme/plugin.py"].splitlines())
    missing = [x for x in files["bedplate_acme/plugin.py"].splitlines() if x not in lines]
    assert missing == [], "the tutorial only adds to plugin.py"


def test_it_fits_in_400_lines():
    lines = sum(len(text(p).splitlines()) for p in EXAMPLE.glob("bedplate_acme/*.py"))
    assert lines <= MOST_LINES
    print(f"{lines} lines of {MOST_LINES}")


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "deepseek_v3", "gpt_oss"])
def test_its_attention_is_right_where_it_says_so(name):
    from bedplate_acme.attention import AcmeAttention, supports

    assert name in FAMILIES
    model_class, config = family(name)
    spec = probe(model_class, config)
    answer = supports(
        AttentionRequest(calls=spec.calls, dtype="float32", kv_dtype="float32", page_size=4)
    )
    assert bool(answer) == (name not in ("gemma2", "gpt_oss")), answer
    if answer:
        rig, sequences = run_story(
            tiny_model(model_class, config), spec, vocab_size=config.vocab_size,
            backend=AcmeAttention,
        )  # fmt: skip
        assert rig.check(*sequences) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", RMS_NORM_ORDERS)
def test_its_operation_has_the_bits_of_the_reference_where_it_says_so(order, dtype):
    from bedplate_acme import ops

    request = OpRequest(op="rms_norm", dtype="float32", attributes={"order": order})
    if not ops.supports(request):
        assert order == "one_plus_weight_fp32"
        return
    x, weight = torch.randn(5, 64).to(dtype) * 3, torch.randn(64).to(dtype)
    weight = None if order == "no_weight" else weight
    assert torch.equal(ops.rms_norm(x, weight, 1e-6, order), rms_norm(x, weight, 1e-6, order))
