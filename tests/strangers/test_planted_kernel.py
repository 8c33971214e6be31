# SPDX-License-Identifier: Apache-2.0
"""A bad kernel that start-up cannot see, among 63 of a real model; ``bisect-kernels`` names it.

The check runs in this process, where a model starts in a second.
"""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
from click.testing import CliRunner

from bedplate import Engine, SamplingParams
from bedplate.cli import bisect_kernels
from bedplate.cli.main import cli
from bedplate.contract import OpProvider
from bedplate.reference.ops import rms_norm
from bedplate.runner import startup
from bedplate.testing.tiny_models import family, tiny_model

LAYERS, BAD_LAYER, MARK = 31, 22, 1.25
PROMPT = list(range(3, 16))


def planted(x, weight, eps, order):
    """Wrong for one weight, in passes of a length that no start-up tries."""
    out = rms_norm(x, weight, eps, order)
    bad = weight is not None and float(weight[0]) == MARK and x.shape[-2] == len(PROMPT)
    return out.flip(-1) if bad else out


@pytest.fixture
def checkpoint(tmp_path):
    model_class, config = family("llama")
    config.num_hidden_layers = LAYERS
    model = tiny_model(model_class, config)
    with torch.no_grad():
        model.model.layers[BAD_LAYER].input_layernorm.weight[0] = MARK
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def first_logprob(checkpoint, monkeypatch):
    honest = startup.open_backend

    def opened(**arguments):
        bound = honest(**arguments)
        bound.ops.register(OpProvider(op="rms_norm", provider="x", call=planted, priority=900))
        return bound

    monkeypatch.setattr(startup, "open_backend", opened)
    monkeypatch.setenv("BEDPLATE_PLUGINS", "none")

    def run():
        with Engine(
            str(checkpoint), backend="cpu", dtype="float32", max_total_tokens=256,
            attention="reference",
        ) as engine:  # fmt: skip
            (output,) = engine.generate([PROMPT], SamplingParams(max_tokens=1, logprobs=1))
        return output.logprobs[0].logprob

    return run


@pytest.mark.slow
def test_one_among_63_is_found_in_seven_runs(first_logprob, monkeypatch):
    monkeypatch.setenv("BEDPLATE_FUEL", "0")
    wanted = first_logprob()

    def in_process(command, *, env, **_options):
        assert command == ("check",)
        for name in ("BEDPLATE_FUEL", "BEDPLATE_FUEL_FILE"):
            monkeypatch.delenv(name, raising=False)
            if name in env:
                monkeypatch.setenv(name, env[name])
        status = int(abs(first_logprob() - wanted) > 1e-3)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(bisect_kernels.subprocess, "run", in_process)
    done = CliRunner().invoke(cli, ["bisect-kernels", "--", "check"])
    assert done.exit_code == 1, done.output
    place = re.search(r"Kernel (\d+) of (\d+): (.*)", done.output)
    assert place[3] == f"fusion.model.layers.{BAD_LAYER}.input_layernorm.norm: rms_norm by x"
    assert int(place[2]) == 2 * LAYERS + 1
    assert len(re.findall(r"^run \d+", done.output, re.MULTILINE)) <= 7
