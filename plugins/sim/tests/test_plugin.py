# SPDX-License-Identifier: Apache-2.0
"""How the backend is found, chosen and set up."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from benchmarks.device import refuse_simulated

from bedplate.config import EngineConfig
from bedplate.contract import AttentionRequest
from bedplate.errors import ConfigError
from bedplate.reference.ops import OPERATIONS
from bedplate.registry import DecisionLog, open_backend, survey
from bedplate.registry.door import explain_backend
from bedplate.registry.select import BackendRequest
from bedplate_sim.attention import provider
from bedplate_sim.options import SCHEDULES, Options, read_options


def test_comes_through_the_door():
    found = survey()
    record = found.backend("sim")
    assert (record.kind, record.distribution) == ("backend", "bedplate-sim")
    assert record.usable, record.reason
    assert not record.warnings


def test_only_its_name_chooses_it(monkeypatch):
    monkeypatch.setenv("BEDPLATE_PLUGINS", "-cpu,-cuda")
    selection, _ = explain_backend(BackendRequest(), DecisionLog())
    assert selection.record is None
    assert "sim: runs only if it is named" in selection.error.message
    selection, _ = explain_backend(BackendRequest(text="sim"), DecisionLog())
    assert selection.record.name == "sim"


def test_benchmarks_refuse_its_times():
    bound = open_backend(
        config=EngineConfig(backend="sim:2"),
        reference_ops=OPERATIONS,
        decisions=DecisionLog(),
    )
    try:
        engine = SimpleNamespace(runner=SimpleNamespace(bound=bound))
        with pytest.raises(SystemExit, match="'sim' simulates its device"):
            refuse_simulated(engine)
    finally:
        bound.shutdown()


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "reason"),
    [("float32", "float16", ""), ("complex64", "float32", "complex64 is not among float32"),
     ("bfloat16", "float8_e4m3fn", "float8_e4m3fn is not among float32")],
)  # fmt: skip
def test_attention_is_over_real_numbers(dtype, kv_dtype, reason):
    request = AttentionRequest(calls=(), dtype=dtype, kv_dtype=kv_dtype, page_size=16)
    answer = provider.supports(request)
    assert bool(answer) == (not reason)
    assert reason in answer.reason


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ({}, "", Options()),
        ({"schedule": "random", "seed": 3}, "", Options(schedule="random", seed=3)),
        ({}, "schedule=random, seed=3", Options(schedule="random", seed=3)),
        ({"seed": 4}, "schedule=eager,seed=3", Options(schedule="eager", seed=4)),
        ({"seed": "4", "graphs": "false"}, "", Options(seed=4, graphs=False)),
        ({"page_sizes": [8, 1]}, "", Options(page_sizes="8+1")),
        ({"page_sizes": 8}, "", Options(page_sizes="8")),
        ({}, "graphs=true,memory=1024", Options(memory=1024)),
    ],
)
def test_options(given, environment, expected):
    assert read_options(given, {"BEDPLATE_SIM": environment}) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"shedule": "lazy"}, "no option shedule"),
        ({"schedule": "lasy"}, "eager or lazy or random or threaded"),
        ({"seed": -1}, "an integer from 0 on"),
        ({"seed": True}, "an integer from 0 on"),
        ({"memory": "much"}, "'much'"),
        ({"graphs": 3}, "true or false"),
        ({"host_reads": "maybe"}, "force or refuse"),
    ],
)
def test_options_that_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        read_options(given, {})


def ask(backend, options=""):
    """What the demo model says on the command line."""
    command = ["-m", "bedplate", "generate", "--backend", backend, "-p", "What is 12 + 30?"]
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"BEDPLATE_SIM": options},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout


@pytest.fixture(scope="module")
def answer_of_the_host():
    return ask("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_demo_model_answers_on_the_command_line(schedule, answer_of_the_host):
    answer = ask("sim", f"schedule={schedule},host_reads=refuse")
    assert "42" in answer
    assert answer == answer_of_the_host
