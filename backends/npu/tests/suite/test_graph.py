# SPDX-License-Identifier: Apache-2.0
"""Recorded decode: updates, fences, limits."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from backends.npu.tests.suite.scenario import LIMIT, Scenario

from bedplate.batch.forward_mode import ForwardMode
from bedplate.errors import CaptureError, ConfigError, ContractError, ReplayError
from bedplate.reference.attention import ReferenceAttention
from bedplate_npu import graph as graph_module
from bedplate_npu.selftest import call_of, run_self_test

pytestmark = pytest.mark.npu_silicon


def with_options(runtime, monkeypatch, **changes):
    monkeypatch.setattr(runtime, "options", replace(runtime.options, **changes))
    return runtime


def test_replays_agree_with_the_reference(runtime):
    assert Scenario(runtime).worst() < LIMIT


def test_replays_agree_with_updates_from_another_thread(runtime, monkeypatch):
    assert Scenario(with_options(runtime, monkeypatch, overlap_update=True)).worst() < LIMIT


def test_latents_are_recorded_too(runtime):
    latent = {"num_kv_heads": 1, "head_dim": 576, "value_dim": 512, "value_in_key": True}
    assert Scenario(runtime, calls=(call_of(**latent), call_of(1))).worst() < LIMIT


def test_a_moved_input_is_found_in_debug_mode(runtime, monkeypatch):
    scenario = Scenario(with_options(runtime, monkeypatch, check_addresses=True))
    assert scenario.worst() < LIMIT
    captured = next(iter(scenario.runner._graphs.values()))
    moved = replace(captured.batch, positions=captured.batch.positions.clone())
    with pytest.raises(ReplayError, match="has moved"):
        scenario.runner.update_host_parameters(captured.graph, moved)


def test_no_more_graphs_than_the_device_takes(runtime, monkeypatch):
    scenario = Scenario(with_options(runtime, monkeypatch, max_graphs=2))
    runner = scenario.make_runner(sizes=(1, 2, 4))
    runner.capture()
    assert [key.batch_size for key in runner.captured] == [4, 2]
    (decision,) = scenario.decisions
    assert decision.point == "graph.1"
    assert "takes 2 graphs" in decision.candidates[0].reason
    runner.release()
    scenario.decisions.clear()
    monkeypatch.setattr(runtime, "options", replace(runtime.options, max_graphs=0))
    runner.capture()
    assert len(runner.captured) == 3


def test_buckets_are_dropped_when_streams_run_out(runtime, monkeypatch):
    scenario = Scenario(runtime)
    runner = scenario.make_runner(sizes=(1, 2, 4))
    real, begun = runner._npu.graph, []

    def graph(*args, **kwargs):
        begun.append(1)
        if len(begun) > 1:
            raise RuntimeError("error code is 207008: stream resource is not enough")
        return real(*args, **kwargs)

    monkeypatch.setattr(runner, "_npu", Overlay(runner._npu, graph=graph))
    runner.capture()
    assert [key.batch_size for key in runner.captured] == [4]
    assert len(begun) == 2  # the third is not even tried
    reasons = [decision.candidates[0].reason for decision in scenario.decisions]
    assert "207008" in reasons[0]
    assert "no stream left; this one was not tried" in reasons[1]
    assert [d.chosen for d in scenario.decisions] == ["graph for 4"] * 2


class Overlay:
    """A module with some functions replaced."""

    def __init__(self, below, **functions):
        self._below = below
        vars(self).update(functions)

    def __getattr__(self, name):
        return getattr(self._below, name)


def test_captured_calls_must_be_as_many_as_the_model_makes(runtime):
    records = [SimpleNamespace(kwargs={"actual_seq_lengths_kv": [1]})]
    graph = SimpleNamespace(graph_dispatch_mode=SimpleNamespace(graph_dispatch_records=records))
    graph_module._check_records(graph, ("actual_seq_lengths_kv",))
    with pytest.raises(CaptureError, match="1 calls with lengths were recorded"):
        graph_module._check_records(graph, ("actual_seq_lengths_kv",) * 2)
    with pytest.raises(CaptureError, match="no actual_seq_kvlen"):
        graph_module._check_records(graph, ("actual_seq_kvlen",))


def test_attention_that_reads_the_host_is_not_recorded(runtime):
    scenario = Scenario(runtime)
    request = scenario.make_runner().request
    attention = object.__new__(ReferenceAttention)
    assert graph_module.make_graph_runner(replace(request, attention=attention)) is None
    (decision,) = scenario.decisions
    assert (decision.point, decision.chosen) == ("graph.attention", "eager")
    assert isinstance(graph_module.make_graph_runner(request), graph_module.NpuGraphRunner)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("graph_problem", "TASK_QUEUE_ENABLE=2 is set", "TASK_QUEUE_ENABLE=2"),
        ("off", {"graphs": "the self-test found nonsense"}, "found nonsense"),
    ],
)
def test_graphs_that_cannot_be_are_refused(runtime, monkeypatch, name, value, part):
    monkeypatch.setattr(runtime, name, value)
    with pytest.raises(ConfigError, match=part):
        graph_module.make_graph_runner(Scenario(runtime).make_runner().request)


def test_a_request_beyond_its_row_of_pages_is_refused(runtime):
    scenario = Scenario(runtime)
    device, _host = scenario.both.batches((1, 1, 1), ForwardMode.DECODE)
    too_long = replace(device, seq_lens_cpu=torch.tensor([10, 257, 3], dtype=torch.int32))
    with pytest.raises(ContractError, match="257 tokens, but its row of pages holds 256"):
        scenario.both.attention.update_inputs(too_long)


def test_the_self_test_finds_everything_in_order(runtime):
    assert run_self_test(runtime) == {}


def test_the_self_test_switches_off_what_differs(runtime, monkeypatch, caplog):
    from bedplate_npu import attention, ops

    real = ops.fused_infer_attention

    def wrong(*args, **kwargs):
        out = real(*args, **kwargs)
        if kwargs.get("window") is not None:
            raise RuntimeError("tiling failed")
        return out * 1.5 if kwargs.get("query_rope") is not None else out

    monkeypatch.setattr(attention.ops, "fused_infer_attention", wrong)
    off = run_self_test(runtime)
    assert sorted(off) == ["latents", "sinks", "windows"]
    assert "tiling failed" in off["windows"]
    assert "away from the reference" in off["latents"]
    assert "latents is switched off" in caplog.text


def test_the_hooks_lead_here(runtime):
    from bedplate.contract import KVPoolRequest
    from bedplate.reference.ops import OPERATIONS
    from bedplate.registry.decisions import DecisionLog
    from bedplate.registry.ops import Operations
    from bedplate_npu.memory import NpuKVPool
    from bedplate_npu.plugin import backend

    assert backend.bedplate_manifest().name == "npu"
    assert backend.bedplate_capabilities(runtime).device_type == "npu"
    offered = []
    backend.bedplate_register_attention(offered.append)
    assert [provider.name for provider in offered] == ["fused_infer"]
    operations = Operations(OPERATIONS, DecisionLog(), "npu", "none")
    backend.bedplate_register_ops(operations)
    pool = backend.bedplate_make_kv_pool(
        KVPoolRequest(
            runtime=runtime, calls=(call_of(),), num_tokens=256, page_size=128,
            dtype=torch.bfloat16,
        )
    )  # fmt: skip
    assert isinstance(pool, NpuKVPool)
    request = Scenario(runtime).make_runner().request
    runner = backend.bedplate_make_graph_runner(request)
    assert isinstance(runner, graph_module.NpuGraphRunner)
    assert runtime.memory().total_bytes > 0
    runtime.seed(3)
