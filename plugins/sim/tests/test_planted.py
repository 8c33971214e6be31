# SPDX-License-Identifier: Apache-2.0
"""Mistakes planted in the core's own host code are found, with the names of both sides."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from bedplate import Engine, SamplingParams
from bedplate.batch.forward_mode import ForwardMode
from bedplate.batch.schedule_batch import ScheduleBatch
from bedplate.runner import host_buffers
from bedplate.runner.host_buffers import HostBuffers
from bedplate.runner.staging import Staging
from bedplate.testing.tiny_models import family, tiny_model
from bedplate_sim.races import RaceError


class Reached:
    """An event that nobody recorded."""

    def synchronize(self):
        pass

    def query(self):
        return True


take_buffer = HostBuffers.take


def careless(self, num_bytes):
    """``HostBuffers.take`` with no memory of the copies under way."""
    self._copied = [None] * len(self._copied)
    return take_buffer(self, num_bytes)


def decode(step, size=3):
    rows = np.arange(1, size + 1, dtype=np.int32)
    lens = np.full(size, step + 1, np.int32)
    return ScheduleBatch(
        mode=ForwardMode.DECODE,
        req_pool_indices=rows,
        seq_lens=lens,
        input_ids=np.full(size, 100 + step, np.int64),
        positions=lens.astype(np.int64) - 1,
        out_cache_loc=rows * 10 + step,
    )


def stage(runtime, steps=6):
    """Stage some steps and wait at the end only; the tokens that arrived."""
    table = torch.zeros((5, 16), dtype=torch.int32, device=runtime.device)
    stager = Staging(runtime, table, torch.int32, unified=False)
    arrived = [stager.stage(decode(step), None).input_ids.clone() for step in range(steps)]
    runtime.synchronize()
    return [tokens.tolist() for tokens in arrived]


def test_staging_is_right(runtime):
    assert stage(runtime) == [[100 + step] * 3 for step in range(6)]


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random", "threaded"])
def test_staging_without_its_wait(take, schedule, monkeypatch):
    monkeypatch.setattr(HostBuffers, "take", careless)
    with pytest.raises(RaceError, match=r"Tensor\.numpy of pinned memory.*aten\.copy_"):
        stage(take(schedule=schedule))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model_class, config = family("llama")
    config.num_hidden_layers = 1
    tiny_model(model_class, config).float().save_pretrained(folder)
    return folder


@pytest.fixture(params=["lazy", "random"])
def schedule(request):
    return request.param


@pytest.fixture
def engine(folder, schedule):
    engine = Engine(
        str(folder), backend="sim", backend_options={"sim": {"schedule": schedule}},
        max_running_requests=2, max_context_len=48, page_size=1, capture_tokens=(),
    )  # fmt: skip
    yield engine
    engine.close()


def generate(engine):
    prompts = [[5, 6, 7], [8, 9]]
    return engine.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))


def test_the_engine_without_the_wait_for_its_tokens(engine):
    executor = engine._started.executor
    launch = executor.launch
    executor.launch = lambda batch: replace(launch(batch), event=Reached())
    for output in generate(engine):
        assert output.finish_reason == "error"
        assert "Tensor.numpy of pinned memory" in output.error


def test_the_loop_of_recorded_steps_without_its_wait(engine, monkeypatch):
    loop = engine.runner.decode_loop
    assert all(output.finish_reason == "length" for output in generate(engine))
    monkeypatch.setattr(host_buffers, "BUFFERS", 1)  # else a step's own wait covers it
    monkeypatch.setattr(loop._host, "take", partial(careless, loop._host))
    found = [output.error for output in generate(engine) if output.finish_reason == "error"]
    assert found
    assert all("Tensor.numpy of pinned memory" in error for error in found)


@pytest.mark.parametrize("schedule", ["lazy"])
def test_a_pass_that_reads_the_host_in_its_midst(engine):
    """Planted in the model: a branch on a value."""
    device = engine.runner.bound.runtime.simulated
    device.options = replace(device.options, host_reads="refuse")
    forward, model = engine.runner.model.forward, engine.runner.model

    def curious(batch):
        output = forward(batch)
        output.next_token_logits.isnan().any().item()
        return output

    model.forward = curious
    (output, _) = generate(engine)
    assert output.finish_reason == "error"
    assert "aten._local_scalar_dense" in output.error
