# SPDX-License-Identifier: Apache-2.0
"""Whole models through the operators of layer B in float32, where the reference is exact.

No device computes attention in float32, and in bfloat16 a mistake of a percent hides among
roundings.  So the dtype, and nothing else, is let through here: what the backend does around
its operators (scales, layouts, padding, latents, lengths, masks) then is the reference's to
float32's precision.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends.npu.tests.simulated import bodies
from backends.npu.tests.suite.test_engine import PROMPTS, apart, engine_of, generate, shaped

from bedplate.testing.tiny_models import tiny_model
from bedplate_npu import attention, ops

pytestmark = pytest.mark.npu_silicon

FAMILIES = {
    "qwen3": "norms of heads",
    "mistral": "windows",
    "gpt_oss": "sinks, windows",
    "minicpm3": "latents",
    "deepseek_v2": "latents, angles in pairs, experts",
    "deepseek_v3": "latents, angles in pairs, experts",
}
"""Family → what is special about its attention."""
LIMIT = 1e-5
"""Largest difference of logits, relative to the largest: sums in another order."""


@pytest.fixture(autouse=True)
def float32_let_through(monkeypatch):
    supports, need = attention._supports, bodies.need

    def as_bfloat16(request, off):
        return supports(replace(request, dtype="bfloat16", kv_dtype="bfloat16"), off)

    def but_for_the_dtype(fine, text):
        need(fine or text.startswith("query dtype"), text)

    monkeypatch.setattr(attention, "_supports", as_bfloat16)
    monkeypatch.setattr(ops, "DTYPES", (*ops.DTYPES, torch.float32))
    monkeypatch.setattr(bodies, "need", but_for_the_dtype)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(tmp_path, name):
    reference = tiny_model(*shaped(name))
    reference.save_pretrained(tmp_path)
    with engine_of(tmp_path, dtype="float32") as engine:
        assert chosen(engine) == "fused_infer"
        for prompt in PROMPTS:
            engine.kept.clear()
            (tokens,) = generate(engine, [prompt])
            with torch.no_grad():
                want = reference(torch.tensor([prompt + tokens[:-1]])).logits[0]
            got = torch.cat([logits for _, logits in engine.kept])
            assert apart(got, want[len(prompt) - 1 :]) < LIMIT
        assert engine.runner.graph_runner.stats.replays


def chosen(engine):
    return next(d.chosen for d in engine.runner.decisions if d.point == "attention")


def test_far_logits_in_bfloat16_are_those_of_other_experts():
    """Why tokens of a tiny DeepSeek part from float32's: a rounding chooses other experts.

    Without any backend: transformers in both dtypes, on the longest prompt.  Every row whose
    logits lie far off is one that was routed otherwise, and the others are close.
    """
    model_class, config = shaped("deepseek_v3")
    narrow = tiny_model(model_class, config, dtype=torch.bfloat16)
    wide = tiny_model(model_class, config, dtype=torch.bfloat16).float()
    (rough, experts), (exact, wanted) = (routed(model, PROMPTS[-1]) for model in (narrow, wide))
    far = (rough - exact).abs().amax(-1) > 7e-2 * exact.abs().max()
    otherwise = (experts.sort(-1).values != wanted.sort(-1).values).any(-1)
    assert otherwise.any()
    assert torch.equal(far, otherwise)


def routed(model, prompt):
    """Logits ``[T, V]`` and experts of every token."""
    (router,) = [m for m in model.modules() if type(m).__name__.endswith("Router")]
    seen = []
    hook = router.register_forward_hook(lambda _module, _args, output: seen.append(output[-1]))
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0].float()
    hook.remove()
    return logits, seen[0]
