# SPDX-License-Identifier: Apache-2.0
"""The whole engine over the device: the tokens of the host, whatever the schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bedplate import Engine, SamplingParams
from bedplate.scheduling.roster import Roster
from bedplate.testing.tiny_models import family, tiny_model

SCHEDULES = ("eager", "lazy", "random", "threaded")
LENGTHS = (5, 33, 1, 17, 40)
NEW = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen3 with random weights, and no tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    model_class, config = family("qwen3")
    config.num_hidden_layers = 2
    config.layer_types = config.layer_types[:2]
    tiny_model(model_class, config).float().save_pretrained(folder)
    return folder


def open_engine(folder, backend, options=(), **settings):
    common = {"dtype": "float32", "max_running_requests": 4, "max_context_len": 64}
    options = {"host_reads": "refuse", **dict(options)}
    return Engine(
        str(folder), backend=backend, backend_options={"sim": options}, **(common | settings)
    )


def prompts(lengths=LENGTHS):
    rng = np.random.default_rng(5)
    return [rng.integers(4, 160, size=n).tolist() for n in lengths]


def answers(engine, **sampling):
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, **sampling)
    outputs = engine.generate(prompts(), params)
    assert [output.error for output in outputs] == [""] * len(outputs)
    return [output.token_ids for output in outputs]


SAMPLING = {
    "greedy": {},
    "random": {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "seed": 3},
}


@pytest.fixture(scope="module")
def expected(folder):
    """The host's tokens."""
    engine = open_engine(folder, "cpu")
    yield {name: answers(engine, **sampling) for name, sampling in SAMPLING.items()}
    engine.close()


SETTINGS = {
    # Prompts too; which of them pay is timed otherwise, and here they must be recorded.
    "whole steps": {"capture_tokens": (16, 32, 64)},
    "a step at a time": {"overlap": False, "capture_tokens": ()},
    "eager": {"graphs": False},
    # So small that somebody has to give way, and come back in chunks.
    "tiny": {
        "max_total_tokens": 64,
        "chunked_prefill_tokens": 16,
        "page_size": 8,
        "mixed": True,
        "capture_tokens": (8, 20),
    },
}
CASES = [
    *((schedule, "whole steps") for schedule in SCHEDULES),
    *((schedule, "tiny") for schedule in SCHEDULES),
    ("lazy", "a step at a time"),
    ("random", "eager"),
]


@pytest.mark.parametrize(("schedule", "settings"), CASES)
def test_tokens_are_those_of_the_host(folder, expected, schedule, settings, monkeypatch):
    """Five requests for four places, greedy and not, without one wait beside the steps' own."""
    preempted, preempt = [], Roster.preempt
    monkeypatch.setattr(
        Roster,
        "preempt",
        lambda roster, request: (preempted.append(request), preempt(roster, request)),
    )
    options = {"schedule": schedule, "seed": 11}
    engine = open_engine(folder, "sim", options, **SETTINGS[settings])
    try:
        for name in SAMPLING if settings == "whole steps" else ("greedy",):
            assert answers(engine, **SAMPLING[name]) == expected[name]
        replays = engine.runner.graph_runner and engine.runner.graph_runner.stats.replays
        assert bool(replays) == (settings != "eager")
        prompts = engine.runner.prompt_graphs
        wanted = bool(SETTINGS[settings].get("capture_tokens"))
        assert (prompts is not None and prompts.stats.replays.total() > 0) == wanted
        assert bool(preempted) == (settings == "tiny")
        assert not engine.decisions.unexplained()
    finally:
        engine.close()


def test_logprobs_come_with_their_step_and_make_nobody_wait(folder):
    params = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    found = {}
    for backend in ("cpu", "sim"):
        with open_engine(folder, backend, {"schedule": "lazy"}) as engine:
            outputs = engine.generate(prompts(), params)
            assert [output.error for output in outputs] == [""] * len(outputs)
            found[backend] = [
                entry.logprob for o in outputs for entry in (*o.logprobs, *o.prompt_logprobs)
            ]
    np.testing.assert_allclose(found["sim"], found["cpu"], atol=1e-4)


MASKS = {
    "little": {"graphs": False, "asynchronous": False, "index_dtype": "int64", "page_sizes": 1},
    "sampling outside": {"sampling_inside": False, "event_delay_ms": 1},
}


@pytest.mark.parametrize("mask", MASKS)
def test_devices_that_can_do_less(folder, expected, mask):
    engine = open_engine(folder, "sim", MASKS[mask] | {"host_reads": "force"})
    try:
        found = engine.runner.bound.capabilities
        assert found.graph.supported == found.memory.asynchronous == (mask != "little")
        assert (engine.runner.graph_runner is not None) == (mask != "little")
        assert answers(engine) == expected["greedy"]
    finally:
        engine.close()


def test_what_fails_ends_its_requests_only_until_the_device_is_lost(folder, expected):
    engine = open_engine(folder, "sim")
    words = {"replay": "at this replay", "allocation": "Give it more with the option memory"}
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    try:
        for what, said in words.items():
            engine.runner.bound.runtime.simulated.fail(what, 3)
            outputs = engine.generate(prompts(), params)
            failed = [output for output in outputs if output.finish_reason == "error"]
            assert failed
            assert all(said in output.error for output in failed)
            for output, tokens in zip(outputs, expected["greedy"], strict=True):
                assert output.token_ids == tokens[: len(output.token_ids)]
            assert answers(engine) == expected["greedy"]

        engine.runner.bound.runtime.simulated.fail("launch", 20)
        outputs = engine.generate(prompts(), SamplingParams(max_tokens=NEW))
        assert outputs[-1].finish_reason == "error"
        assert "told to fail" in outputs[-1].error
        (again,) = engine.generate(prompts((3,)), SamplingParams(max_tokens=NEW))
        assert "start a new engine" in again.error
    finally:
        engine.close()


def test_graphs_see_weights_that_are_updated_in_place_and_refuse_those_that_moved(folder):
    name = "model.layers.0.mlp.down_proj.weight"
    answered = {}
    for backend in ("cpu", "sim"):
        with open_engine(folder, backend, {"host_reads": "force"}) as engine:
            (old,) = (p for n, p in engine.runner.loaded.module.named_parameters() if n == name)
            generator = torch.Generator().manual_seed(1)
            new = torch.randn(old.shape, generator=generator) * 0.2
            before = answers(engine)
            assert engine.runner.update_weights_from_tensor([(name, new)])
            answered[backend] = answers(engine)
            assert answered[backend] != before
            if backend == "sim":
                old.data = old.detach().clone()
                outputs = engine.generate(prompts(), SamplingParams(max_tokens=NEW))
                errors = [o.error for o in outputs if o.finish_reason == "error"]
                assert errors
                assert all("given back after the capture" in error for error in errors)
    assert answered["sim"] == answered["cpu"]
