# SPDX-License-Identifier: Apache-2.0
"""On a device: every certified family gives transformers' tokens, fused or not.

In float32 tokens are those of the oracle; in bfloat16 a token may be another where the oracle
itself cannot tell the two apart: by no more than what bfloat16 does to its own logits.  That
is measured over all prompts of a family: where experts are chosen, a rounding may send a token
to others, in one implementation at one prompt and in the other at another.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bedplate import Engine, SamplingParams
from bedplate.testing.tiny_models import FAMILIES, family, tiny_model

pytestmark = pytest.mark.accelerator

LENGTHS, NEW = (5, 33, 1, 17, 48, 16), 12


@pytest.fixture(scope="module")
def oracles(tmp_path_factory):
    """Model in float32 on the device, and folder, by family; made once."""
    made = {}

    def of(name):
        if name not in made:
            model_class, config = family(name)
            folder = tmp_path_factory.mktemp(name)
            model = tiny_model(model_class, config).to(torch.bfloat16)
            model.save_pretrained(folder)
            made[name] = (model.float().cuda(), folder)
        return made[name]

    return of


@torch.no_grad()
def logits_of(model, prompt, tokens):
    """``[T, V]`` float32 of the places where ``tokens`` were chosen."""
    ids = torch.tensor([[*prompt, *tokens]], device="cuda")
    return model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()


def all_logits(model, prompts, outputs):
    """``[R, V]`` of every token of every output."""
    pairs = zip(prompts, outputs, strict=True)
    return torch.cat([logits_of(model, prompt, output.token_ids) for prompt, output in pairs])


def check(oracle, folder, *, dtype, **settings):
    rng = np.random.default_rng(5)
    vocabulary = oracle.config.get_text_config().vocab_size
    prompts = [rng.integers(4, vocabulary, size=n).tolist() for n in LENGTHS]
    with Engine(
        str(folder), backend="cuda", dtype=dtype, max_context_len=128, max_running_requests=8,
        chunked_prefill_tokens=24, max_total_tokens=1024, **settings,
    ) as engine:  # fmt: skip
        outputs = engine.generate(prompts, SamplingParams(max_tokens=NEW, ignore_eos=True))
    assert [(o.finish_reason, o.error) for o in outputs] == [("length", "")] * len(outputs)
    noise = 1e-3
    if dtype == "bfloat16":
        rounded = all_logits(oracle.bfloat16(), prompts, outputs)
        noise = float((rounded - all_logits(oracle.float(), prompts, outputs)).abs().max())
    logits = all_logits(oracle, prompts, outputs)
    tokens = torch.tensor([o.token_ids for o in outputs], device="cuda").flatten()
    behind = logits.max(-1).values - logits[torch.arange(len(tokens)), tokens]
    assert float(behind.max()) <= 2 * noise


@pytest.mark.parametrize("fusion", ["block", "leaf", "off"])
@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16(name, fusion, oracles):
    check(*oracles(name), dtype="bfloat16", fusion=fusion)


@pytest.mark.parametrize("graphs", [True, False], ids=["recorded", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_float32(name, graphs, oracles):
    check(*oracles(name), dtype="float32", graphs=graphs)
