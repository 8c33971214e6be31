# SPDX-License-Identifier: Apache-2.0
"""Whole models through graphs: logits against transformers in float32, not only tokens."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from bedplate import Engine, SamplingParams
from bedplate.testing.tiny_models import family, tiny_model

pytestmark = pytest.mark.npu_silicon

NEW = 5
PROMPTS = [np.random.default_rng(5).integers(4, 160, size=n).tolist() for n in (5, 33, 1, 130)]
SIZES = {
    "num_hidden_layers": 2, "head_dim": 64, "hidden_size": 128, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "scale_emb": 1,
}  # fmt: skip
LIMIT = 7e-2
"""Largest difference of logits, relative to the largest: bfloat16 through two layers."""


def shaped(name):
    """Class and configuration of a family, tiny but in sizes that the operators take."""
    model_class, config = family(name)
    for field, value in SIZES.items():
        if hasattr(config, field):
            setattr(config, field, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: SIZES["num_hidden_layers"]]
    return model_class, config


@pytest.fixture(scope="module", params=["llama", "qwen3", "minicpm3"])
def model(request, tmp_path_factory):
    """A folder with a tiny model, and the same model in float32 on the host."""
    model_class, config = shaped(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    made = tiny_model(model_class, config).to(torch.bfloat16)
    made.save_pretrained(folder)
    return folder, made.float()


@contextmanager
def engine_of(folder, **settings):
    """An engine that keeps the logits of every pass."""
    defaults = {
        "dtype": "bfloat16", "max_context_len": 256, "max_running_requests": 4,
        "max_total_tokens": 1024, "graphs": True, "capture_sizes": (2, 4),
        "backend_options": {"npu": {"self_test": False}},  # test_graph has it
    }  # fmt: skip
    with Engine(str(folder), backend="npu", **{**defaults, **settings}) as engine:
        engine.kept, run = [], engine.runner.run

        def keeping(batch):
            output, graph, reason = run(batch)
            engine.kept.append((graph, output.next_token_logits.float().cpu()))
            return output, graph, reason

        engine.runner.run = keeping
        yield engine


def apart(got, want):
    return float((got - want).abs().max() / want.abs().max())


def generate(engine, prompts):
    outputs = engine.generate(prompts, SamplingParams(max_tokens=NEW, ignore_eos=True))
    assert [output.error for output in outputs] == [""] * len(prompts)
    return [list(output.token_ids) for output in outputs]


def test_a_model_generates_through_graphs(runtime, model):
    folder, reference = model
    with engine_of(folder) as engine:
        assert _chosen(engine, "attention") == "fused_infer"
        for prompt in PROMPTS:
            engine.kept.clear()
            (tokens,) = generate(engine, [prompt])
            assert [graph for graph, _ in engine.kept] == [None] + [2] * (NEW - 1)
            with torch.no_grad():
                want = reference(torch.tensor([prompt + tokens[:-1]])).logits[0]
            got = torch.cat([logits for _, logits in engine.kept])
            assert apart(got, want[len(prompt) - 1 :]) < LIMIT
        engine.kept.clear()
        generate(engine, PROMPTS)  # a batch, padded and not
        replays = engine.runner.graph_runner.stats.replays
        assert replays[4]
        assert replays[2]


def _chosen(engine, point):
    return next(d.chosen for d in engine.runner.decisions if d.point == point)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_eager_and_recorded_passes_agree(runtime, model):
    folder, _ = model
    results = []
    for graphs in (False, True):
        with engine_of(folder, graphs=graphs) as engine:
            tokens = generate(engine, PROMPTS[:3])
            results.append((tokens, [logits for _, logits in engine.kept]))
    (eager_tokens, eager), (tokens, recorded) = results
    assert tokens == eager_tokens
    for got, want in zip(recorded, eager, strict=True):
        assert apart(got, want) < 1e-2


def test_what_was_found_is_in_the_facts(runtime):
    from bedplate_npu.availability import EVIDENCE
    from bedplate_npu.runtime import capabilities

    answer = capabilities(runtime)
    assert answer.facts["evidence"] == EVIDENCE
    assert answer.facts["communicator"] == "hccl"
    assert answer.facts["self-test"] == "all features agree"
    assert answer.facts.get("simulated", "") == runtime.simulated
    assert answer.graph.default
    assert answer.memory.page_sizes == (128,)
    assert answer.arch in ("a2", "a3", "950")
