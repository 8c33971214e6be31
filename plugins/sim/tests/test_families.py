# SPDX-License-Identifier: Apache-2.0
"""Every family of models records and replays on the device, with the tokens of the host."""

from __future__ import annotations

import numpy as np
import pytest

from bedplate import Engine, SamplingParams
from bedplate.testing.tiny_models import FAMILIES, family, tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
]


def tokens(folder, backend, vocab):
    rng = np.random.default_rng(5)
    prompts = [rng.integers(4, vocab, size=n).tolist() for n in (5, 17, 1)]
    settings = {"dtype": "float32", "max_running_requests": 4, "max_context_len": 64}
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    with Engine(str(folder), backend=backend, page_size=8, **settings) as engine:
        outputs = engine.generate(prompts, params)
        assert [output.error for output in outputs] == [""] * 3
        runner = engine.runner.graph_runner
        dropped = [d for d in engine.decisions if d.point.startswith("graph.")]
        return [o.token_ids for o in outputs], runner and runner.stats, dropped


EAGER = {"gpt2": "aten.copy_", "phimoe": "aten.copy_", "longcat_flash": "aten.nonzero"}
"""Families whose passes no graph can hold, and why not: the device says so as others do."""


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, tmp_path):
    model_class, config = family(name)
    tiny_model(model_class, config).float().save_pretrained(tmp_path)
    vocab = config.get_text_config().vocab_size
    expected, *_ = tokens(tmp_path, "cpu", vocab)
    found, stats, dropped = tokens(tmp_path, "sim", vocab)
    assert found == expected
    reasons = [decision.candidates[0].reason for decision in dropped]
    assert bool(reasons) == (name in EAGER), reasons
    assert all(EAGER[name] in reason for reason in reasons)
    assert reasons or stats.replays.total() >= 7
