# SPDX-License-Identifier: Apache-2.0
"""The engine that people construct: the bundled model on the default backend."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace

import pytest

from bedplate import Engine, SamplingParams
from bedplate.config import resolve_config
from bedplate.errors import BedplateError

PROMPTS = ["Once upon a time", "2 + 3 =", "The capital of Senegal is"] * 2
# In bfloat16 a recomputed prefix may differ by a rounding, and then by a token.
CPU = {"backend": "cpu", "dtype": "float32"}
SAMPLED = SamplingParams(max_tokens=24, temperature=0.8, seed=5)


@pytest.fixture(scope="module")
def expected():
    """Each prompt alone, without anything clever."""
    with Engine(**CPU, prefix_cache=False, overlap=False) as engine:
        return [engine.generate(prompt, SAMPLED)[0].token_ids for prompt in PROMPTS]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"overlap": True},
        {"chunked_prefill_tokens": 16, "page_size": 16},
        {"max_running_requests": 2},
        {"max_total_tokens": 64, "page_size": 8, "overlap": True},  # hardly any room
    ],
    ids=lambda settings: ",".join(settings) or "default",
)
def test_company_changes_nothing(expected, settings):
    with Engine(**CPU, max_context_len=64, **settings) as engine:
        outputs = engine.generate(PROMPTS, SAMPLED)
        pieces = list(engine.stream(PROMPTS[0], SAMPLED))
        answered = asyncio.run(engine.async_generate(PROMPTS[:2], SAMPLED))
    assert [output.token_ids for output in outputs] == expected
    assert [output.token_ids for output in answered] == expected[:2]
    assert "".join(piece.text for piece in pieces) == outputs[0].text
    assert outputs[0].text.strip()


def test_an_engine_from_settings_tells_what_it_does():
    told = []
    config = resolve_config({"backend": "cpu", "max_context_len": 64})
    with Engine.from_config(config, progress=lambda *news: told.append(news)) as engine:
        assert engine.config.backend == "cpu"
        assert engine.config.max_context_len == 64
        assert list(engine.decisions)
    engine.close()


def test_a_tokenizer_that_is_missing_gives_the_backend_back(tmp_path, monkeypatch):
    from bedplate.runner import startup

    closed = []
    inner = startup.start

    def start(*args, **more):
        started = inner(*args, **more)
        shutdown = lambda: (closed.append(True), started.bound.shutdown())  # noqa: E731
        return replace(started, bound=replace(started.bound, shutdown=shutdown))

    monkeypatch.setattr(startup, "start", start)
    with pytest.raises(BedplateError, match="tokenizer"):
        Engine(backend="cpu", max_context_len=64, tokenizer=str(tmp_path))
    assert closed == [True]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_frozen_behind_an_engine(tmp_path, fails):
    """What the collector must not walk while serving is its business again afterwards."""
    before = gc.get_freeze_count()
    if fails:
        with pytest.raises(BedplateError):
            Engine(str(tmp_path / "nothing"), **CPU)
    else:
        with Engine(**CPU, max_context_len=64):
            assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == 0
    assert gc.isenabled()
