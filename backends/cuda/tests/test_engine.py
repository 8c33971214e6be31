# SPDX-License-Identifier: Apache-2.0
"""The engine on a device: recorded as eager, every time the same, nobody harms anybody."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from bedplate import Engine, SamplingParams
from bedplate.testing.tiny_models import family, tiny_model

pytestmark = pytest.mark.accelerator

LENGTHS, NEW = (5, 33, 1, 17, 48, 16), 12
ALL_SIZES = tuple(range(1, 9))
"""A graph for every batch, so that no batch is padded to another form of a product."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model_class, config = family("qwen3")
    tiny_model(model_class, config).to(torch.bfloat16).save_pretrained(path)
    return path


@contextmanager
def engine_of(folder, **settings):
    defaults = {
        "dtype": "bfloat16", "max_context_len": 256, "max_running_requests": 8,
        "chunked_prefill_tokens": 64, "max_total_tokens": 2048, "capture_sizes": ALL_SIZES,
    }  # fmt: skip
    with Engine(str(folder), backend="cuda", **{**defaults, **settings}) as engine:
        yield engine


def prompts(lengths=LENGTHS, seed=5):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 160, size=length).tolist() for length in lengths]


def answers(engine, asked, new=NEW, logprobs=0):
    """Tokens with their log-probabilities, to the last bit."""
    params = SamplingParams(max_tokens=new, ignore_eos=True, logprobs=logprobs)
    outputs = engine.generate(asked, params)
    assert [output.error for output in outputs] == [""] * len(asked)
    return [(o.token_ids, _chosen(o) if logprobs is not None else None) for o in outputs]


def _chosen(output):
    return [entry.logprob for entry in output.logprobs]


def late_kernels():
    from bedplate_triton.tripwire import tripwire

    return [(late.kernel, late.facts) for late in tripwire.tripped]


def test_recorded_equals_eager_bit_for_bit(folder):
    with engine_of(folder, graphs=False) as engine:
        eager = answers(engine, prompts())
    with engine_of(folder) as engine:
        recorded = answers(engine, prompts())
        assert engine.runner.graph_runner.stats.replays
    assert recorded == eager


def test_nothing_is_compiled_while_serving(folder):
    with engine_of(folder) as engine:
        for lengths in (LENGTHS, (200,), (64, 64, 64), (3,) * 8):
            answers(engine, prompts(lengths), logprobs=None)
        assert late_kernels() == []


def test_a_replay_gives_the_same_bits_a_thousand_times(folder):
    with decoding(folder) as (engine, batch):
        runner = engine.runner.graph_runner
        first = runner.replay(batch).next_token_logits.clone()
        apart = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(1000):
            apart += (runner.replay(batch).next_token_logits != first).any()
        assert int(apart) == 0


def test_a_graph_reads_nothing_of_the_batch_before(folder):
    """Whatever lies behind the rows of a batch in the slots of its graph."""
    with engine_of(folder) as engine:
        want = [answers(engine, [prompt])[0] for prompt in prompts()]
        answers(engine, prompts((90, 80, 70, 60, 50, 40, 30, 20), seed=6))
        assert [answers(engine, [prompt])[0] for prompt in prompts()] == want


@contextmanager
def decoding(folder, requests=8):
    """An engine between two decode steps, and the batch that its graphs replay."""
    with engine_of(folder) as engine:
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        for prompt in prompts((20,) * requests):
            engine.core.add_request(prompt, params)
        tokens = 0
        while tokens < 4 * requests:
            tokens += len(engine.core.step().token_ids)
        with engine.runner.bound.runtime.inference_guard():
            engine.runner.decode_loop.hold()
            yield engine, engine.runner.graph_runner.resident(requests)
        engine.core.abort_all()


def test_a_step_neither_waits_nor_allocates_and_sends_only_changes(folder):
    with engine_of(folder, max_running_requests=8) as engine:
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        for prompt in prompts((20,) * 8):
            engine.core.add_request(prompt, params)
        for _ in range(20):
            engine.core.step()
        torch.cuda.synchronize()
        sent = engine.runner.decode_loop.sent_bytes
        made = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(50):
                engine.core.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == made
        a_step = (engine.runner.decode_loop.sent_bytes - sent) / 50
        assert a_step <= 16 + 8 * 16  # a header and, at most, every row's next page
        engine.core.abort_all()


def test_passes_with_new_requests_do_not_wait_for_those_before(folder):
    with engine_of(folder) as engine:
        answers(engine, prompts((40,) * 8), logprobs=None)
        params = SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0.5)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for prompt in prompts((40,) * 8):
                engine.core.add_request(prompt, params)
            for _ in range(8):
                engine.core.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        engine.core.abort_all()


def test_a_failing_pass_harms_only_who_is_in_it(folder, monkeypatch):
    with engine_of(folder) as engine:
        want = answers(engine, prompts(), logprobs=None)
        runner, replay = engine.runner.graph_runner, engine.runner.graph_runner.replay
        fails = iter([False, False, True])

        def fragile(batch):
            if next(fails, False):
                raise RuntimeError("the device fell over")
            return replay(batch)

        monkeypatch.setattr(runner, "replay", fragile)
        params = SamplingParams(max_tokens=NEW, ignore_eos=True)
        failed = engine.generate(prompts(), params)
        assert any("fell over" in output.error for output in failed)
        assert answers(engine, prompts(), logprobs=None) == want


class TestDeterministic:
    """The same bits whatever the batch, order, chunks, and graph or eager."""

    @pytest.fixture(scope="class")
    def alone(self, folder):
        with engine_of(folder, deterministic=True) as engine:
            return [answers(engine, [prompt])[0] for prompt in prompts()]

    def test_in_a_batch(self, folder, alone):
        with engine_of(folder, deterministic=True) as engine:
            assert answers(engine, prompts()) == alone
            backwards = answers(engine, prompts()[::-1])
            assert backwards[::-1] == alone

    @pytest.mark.parametrize("chunk", [8, 24, 4096])
    def test_in_chunks(self, folder, alone, chunk):
        settings = {"deterministic": True, "chunked_prefill_tokens": chunk}
        with engine_of(folder, **settings) as engine:
            assert answers(engine, prompts()) == alone

    def test_eager(self, folder, alone):
        with engine_of(folder, deterministic=True, graphs=False) as engine:
            assert answers(engine, prompts()) == alone

    def test_padded(self, folder, alone):
        with engine_of(folder, deterministic=True, capture_sizes=(8,)) as engine:
            assert answers(engine, prompts()) == alone
