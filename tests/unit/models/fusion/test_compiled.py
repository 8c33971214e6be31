# SPDX-License-Identifier: Apache-2.0
"""The model given to torch's compiler: asked for, compared as a whole, and taken back."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bedplate import Engine, SamplingParams
from bedplate.models.fusion import fuse
from bedplate.testing.tiny_models import family, tiny_model

IDS = torch.arange(3, 20)[None]
PROMPTS = [list(range(5, 5 + length)) for length in (1, 9, 30)]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def traced(monkeypatch):
    """Have the compiler trace, and run what it traced as it stands: no kernels, same bits."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def test_shadows_the_whole_model_and_gives_it_back(traced, ops):
    model = tiny_model(*family("llama"))
    want = logits(model)
    plan = fuse(model, ops(), mode="compile")
    assert plan.counts() == {"compiled": 1}
    assert "as a whole" in plan.decisions[0].candidates[0].reason
    assert torch.equal(logits(model), want)
    assert torch._dynamo.utils.counters["frames"]["ok"]
    plan.revert()
    assert not any("forward" in vars(part) for part in model.modules())


def test_a_compiler_that_fails_is_a_decision(monkeypatch, ops):
    def refuse(*_args, **_options):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda _forward, **_options: refuse)
    model = tiny_model(*family("llama"))
    want = logits(model)
    plan = fuse(model, ops(), mode="compile")
    assert plan.counts() == {}
    assert "no compiler here" in plan.decisions[-1].candidates[0].reason
    assert torch.equal(logits(model), want)


def generated(folder, fusion):
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    with Engine(str(folder), backend="cpu", dtype="float32", fusion=fusion) as engine:
        chosen = [d.chosen for d in engine.runner.decisions if d.point.endswith("compiled")]
        return [out.token_ids for out in engine.generate(PROMPTS, params)], chosen


@pytest.mark.parametrize(
    "name",
    [
        "qwen3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_oss", "deepseek_v3")),
    ],
)
def test_an_engine_answers_the_same(name, traced, tmp_path):
    tiny_model(*family(name)).save_pretrained(tmp_path)
    want, _ = generated(tmp_path, "off")
    assert generated(tmp_path, "compile") == (want, ["fused"])


@pytest.mark.slow
def test_an_engine_answers_the_same_with_compiled_kernels(tmp_path):
    torch.compiler.reset()
    tiny_model(*family("qwen3")).save_pretrained(tmp_path)
    want, _ = generated(tmp_path, "off")
    assert generated(tmp_path, "compile") == (want, ["fused"])
