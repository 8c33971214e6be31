# SPDX-License-Identifier: Apache-2.0
"""The engine on a device: as transformers, recorded as eager, every time the same."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from bedplate import Engine, SamplingParams
from bedplate.testing.tiny_models import family, tiny_model

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(torch.version.hip is None, reason="missing capability: torch for ROCm"),
]

LENGTHS, NEW = (5, 33, 1, 17, 48, 16), 12


@pytest.fixture(scope="module")
def model():
    model_class, config = family("qwen3")
    return tiny_model(model_class, config).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@contextmanager
def engine_of(folder, **settings):
    defaults = {
        "dtype": "bfloat16", "max_context_len": 256, "max_running_requests": 8,
        "chunked_prefill_tokens": 64, "max_total_tokens": 2048,
        "capture_sizes": tuple(range(1, 9)),
    }  # fmt: skip
    with Engine(str(folder), backend="rocm", **{**defaults, **settings}) as engine:
        yield engine


def prompts(lengths=LENGTHS):
    rng = np.random.default_rng(5)
    return [rng.integers(4, 160, size=length).tolist() for length in lengths]


def answers(engine, asked):
    """Tokens with their log-probabilities, to the last bit."""
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=0)
    outputs = engine.generate(asked, params)
    assert [output.error for output in outputs] == [""] * len(asked)
    return [(o.token_ids, [entry.logprob for entry in o.logprobs]) for o in outputs]


def test_greedy_tokens_are_those_of_transformers(folder, model):
    with engine_of(folder, dtype="float32") as engine:
        ours = [tokens for tokens, _logprobs in answers(engine, prompts())]
    for prompt, tokens in zip(prompts(), ours, strict=True):
        whole = list(prompt)
        for _ in range(NEW):
            with torch.no_grad():
                whole.append(int(model(torch.tensor([whole])).logits[0, -1].argmax()))
        assert whole[len(prompt) :] == list(tokens)


def test_recorded_equals_eager_bit_for_bit(folder):
    with engine_of(folder, graphs=False) as engine:
        eager = answers(engine, prompts())
    with engine_of(folder) as engine:
        recorded = answers(engine, prompts())
        assert engine.runner.graph_runner.stats.replays
    assert recorded == eager


def test_the_same_every_time_and_nothing_is_compiled_while_serving(folder):
    from bedplate_triton.tripwire import tripwire

    with engine_of(folder) as engine:
        first = answers(engine, prompts())
        assert all(answers(engine, prompts()) == first for _ in range(20))
        assert [(late.kernel, late.facts) for late in tripwire.tripped] == []


def test_fixed_bits_whatever_the_batch(folder):
    with engine_of(folder, deterministic=True) as engine:
        together = answers(engine, prompts())
        assert [answers(engine, [prompt])[0] for prompt in prompts()] == together
