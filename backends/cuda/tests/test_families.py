# SPDX-License-Identifier: Apache-2.0
"""On a device: every certified family gives transformers' tokens, eager and recorded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bedplate import Engine, SamplingParams
from bedplate.testing.tiny_models import FAMILIES, family, tiny_model

pytestmark = pytest.mark.accelerator

LENGTHS, NEW = (5, 33, 1, 17, 48, 16), 12


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, graphs, tmp_path):
    model_class, config = family(name)
    oracle = tiny_model(model_class, config).float()
    oracle.save_pretrained(tmp_path)
    rng = np.random.default_rng(5)
    vocabulary = config.get_text_config().vocab_size
    prompts = [rng.integers(4, vocabulary, size=n).tolist() for n in LENGTHS]
    with Engine(
        str(tmp_path), backend="cuda", dtype="float32", max_context_len=128,
        max_running_requests=8, chunked_prefill_tokens=24, max_total_tokens=1024, graphs=graphs,
        capture_sizes=(1, 2, 4, 8) if graphs else None,
    ) as engine:  # fmt: skip
        outputs = engine.generate(prompts, SamplingParams(max_tokens=NEW, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.finish_reason == "length", output.error
        tokens = torch.tensor(output.token_ids)
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *output.token_ids]])
            logits = oracle(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        behind = logits.max(-1).values - logits[torch.arange(NEW), tokens]
        assert behind.max() <= 2e-3
