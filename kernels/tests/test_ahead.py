# SPDX-License-Identifier: Apache-2.0
"""Launches that are only compiled: once for each sort, and never run."""

from __future__ import annotations

import time

import pytest
import torch
import triton
from kernels.tests.offline import run_offline
from triton.runtime import JITFunction

from bedplate_triton import ahead
from bedplate_triton.ahead import compile_ahead


def kernel_of_a_test(x, count, size):
    raise AssertionError("nothing runs here")


@pytest.fixture
def compiled(monkeypatch):
    """Arguments of every launch that reached the compiler."""
    seen = []
    monkeypatch.setattr(JITFunction, "run", lambda _kernel, *a, **o: seen.append((a, o)))
    return seen


def test_each_sort_of_launch_is_compiled_once(compiled):
    kernel = JITFunction(kernel_of_a_test)
    layers = [torch.zeros(16), torch.ones(32)]
    others = [torch.zeros(17)[1:], torch.zeros(16, dtype=torch.bfloat16)]
    with compile_ahead():
        for x in layers + others:
            kernel[(1,)](x, 3, size=4)
        kernel[(1,)](layers[0], 3, size=8)
        kernel[(1,)](layers[0], True, size=4)
        kernel[(2,)](layers[1], 3, size=4)
    assert [options["size"] for _, options in compiled] == [4, 4, 4, 8, 4]
    assert all(options["warmup"] for _, options in compiled)


def test_launches_run_again_afterwards(compiled):
    before = triton.runtime.JITFunction.run
    with pytest.raises(ValueError, match="of the pass"), compile_ahead():
        raise ValueError("of the pass")
    assert triton.runtime.JITFunction.run is before


SHARED = """
import json, triton
from kernels.matrix.offline import use_offline_driver

use_offline_driver("sm_90")
import torch
from bedplate_triton.ahead import compile_ahead
from bedplate_triton.gated import act_and_mul
from bedplate_triton.features import Features

found = []
triton.knobs.compilation.listener = lambda cache_hit, **_: found.append(cache_hit)
with compile_ahead():
    for act in ("silu", "gelu", "relu", "relu2"):
        act_and_mul(torch.empty((3, 64), device="meta"), act, features=Features())
print(json.dumps({"found": found}))
"""


def test_copies_of_the_process_compile(tmp_path):
    """What they leave on the disk is found there, every kernel of it."""
    said = run_offline("-c", SHARED, TRITON_CACHE_DIR=str(tmp_path))
    assert len(said) == 1  # copies say nothing
    assert said[0]["found"] == [True] * 4


@pytest.fixture
def compiles(monkeypatch):
    """On a machine of four cores, where to compile is to run the job."""
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(ahead, "_make_launcher", lambda _kernel: None)
    return ahead._Compiles()


def test_copies_begin_while_others_are_still_collected(compiles, tmp_path):
    places = [tmp_path / str(number) for number in range(6)]
    futures = [compiles.submit(place.touch) for place in places]
    deadline = time.monotonic() + 20
    while not all(place.exists() for place in places[:4]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not any(place.exists() for place in places[4:])
    assert not any(future.done() for future in futures)
    compiles.finish()
    assert all(place.exists() for place in places)
    assert all(future.done() for future in futures)


def test_what_fails_in_a_copy_says_so_here(compiles):
    def fail():
        raise RuntimeError("no such instruction")

    futures = [compiles.submit(job) for job in (fail, lambda: 7)]
    compiles.finish()
    assert futures[1].result() == 7
    with pytest.raises(RuntimeError, match="no such instruction"):
        futures[0].result()


def test_a_stuck_copy_is_given_up(compiles, monkeypatch):
    monkeypatch.setattr(ahead, "_PATIENCE_S", 0.2)
    here = ahead.os.getpid()
    begin = time.monotonic()
    for _ in range(2):
        compiles.submit(lambda: time.sleep(0 if ahead.os.getpid() == here else 30))
    compiles.finish()
    assert time.monotonic() - begin < 5
