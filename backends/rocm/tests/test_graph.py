# SPDX-License-Identifier: Apache-2.0
"""Captures and replays on the simulated surface, with the traps of HIP's graphs."""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import torch

from bedplate.batch.forward_mode import CaptureHiddenMode
from bedplate.contract import GraphRunnerRequest
from bedplate.testing.tiny_decoder import TinyAttention, TinyDecoder, decode_batch
from bedplate_rocm.graph import HipGraphRunner
from bedplate_rocm.plugin import backend


class Runner(HipGraphRunner):
    """Keeps what a graph must run again; results lie in the memory of its pool."""

    def capture_graph(self, graph, run):
        pool = graph.surface.pools[self.pool]
        graph.run = run
        graph.output = super().capture_graph(graph, lambda: pool.place_results(run()))
        return graph.output


class Careless(Runner):
    """Captures as torch does when it is not told how."""

    def capture_graph(self, graph, run):
        pool, stream = self.pool, self._stream
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="global"):
            return run()


@pytest.fixture
def bench(hip):
    attention = TinyAttention()
    model = TinyDecoder(attention)
    records = []
    request = GraphRunnerRequest(
        runtime=hip.runtime(HIP_FORCE_DEV_KERNARG="1"),
        forward=model,
        attention=attention,
        capture_sizes=(1, 4),
        hidden_modes=(CaptureHiddenMode.NULL,),
        index_dtype="int32",
        record=records.append,
    )
    return SimpleNamespace(hip=hip, request=request, attention=attention, model=model,
                           records=records)  # fmt: skip


def capture(bench, during=lambda _batch: None, kind=Runner):
    """A runner whose passes also do something to the device; what was dropped, and why."""

    def forward(batch):
        during(batch)
        return bench.model(batch)

    runner = kind(dataclasses.replace(bench.request, forward=forward))
    runner.capture()
    dropped = {
        record.point: record.candidates[0].reason
        for record in bench.records
        if record.point.startswith("graph.")
    }
    return runner, dropped


def compare(bench, runner, lengths):
    batch = decode_batch(lengths, bench.attention)
    with torch.no_grad():
        bench.attention.prepare_in_graph(batch)
        expected = bench.model(batch).next_token_logits
        assert runner.can_run(batch)
        torch.testing.assert_close(runner.replay(batch).next_token_logits, expected)


def test_captures_on_the_side_stream_into_one_pool(bench):
    _runner, dropped = capture(bench)
    assert dropped == {}
    assert [line for line in bench.hip.log if not line.startswith(("wait", "empty"))] == [
        "side waits for home",
        "capture pool 1 side thread_local",
        "capture pool 1 side thread_local",
        "home waits for side",
    ]


@pytest.mark.parametrize("lengths", [[3], [2, 5, 4], [1, 2, 3, 4]])
def test_replay_equals_eager(bench, lengths):
    runner, _dropped = capture(bench)
    compare(bench, runner, lengths)


def test_results_of_all_graphs_share_their_memory(bench):
    """A bucket's results keep no memory that the next one could use."""
    runner, _dropped = capture(bench)
    batches = [decode_batch(lengths, bench.attention) for lengths in ([3], [1, 2, 3, 4])]
    first, second = (runner.replay(batch).next_token_logits for batch in batches)
    assert first.data_ptr() == second.data_ptr()
    assert bench.hip.pools["pool 1"].most_bytes == second.nbytes


def test_other_threads_may_ask_for_events(bench):
    """As the thread that watches collectives does, all the time."""
    runner, dropped = capture(bench, lambda _batch: bench.hip.query_event_elsewhere())
    assert dropped == {}
    compare(bench, runner, [2, 3])
    _runner, dropped = capture(bench, lambda _: bench.hip.query_event_elsewhere(), Careless)
    assert "an event was asked" in dropped["graph.4"]  # the trap is one


def test_every_kernel_is_loaded_before_a_capture(bench):
    runner, dropped = capture(bench, lambda b: bench.hip.launch(f"split of {b.batch_size}"))
    assert dropped == {}
    assert len(runner.captured) == 2


@pytest.mark.parametrize(
    ("trap", "cause"),
    [
        (lambda hip: hip.launch("first seen in the capture"), "code of a kernel was loaded"),
        (lambda hip: hip.host_function(), "a host function"),
        (lambda _hip: torch.cuda.synchronize(), "not permitted when stream is capturing"),
    ],
    ids=["a late kernel", "a function of the host", "a wait"],
)
def test_a_capture_that_breaks_off_is_recorded_and_the_next_one_works(bench, trap, cause):
    """It leaves its pool unusable; the next capture gets another."""

    def during(batch):
        if bench.hip.capture and batch.batch_size == 4:
            trap(bench.hip)

    runner, dropped = capture(bench, during)
    assert dropped.keys() == {"graph.4"}
    assert cause in dropped["graph.4"]
    assert [key.batch_size for key in runner.captured] == [1]
    assert bench.hip.broken_pools == {"pool 1"}
    compare(bench, runner, [2])


def test_the_backend_makes_such_a_runner(bench):
    assert isinstance(backend.bedplate_make_graph_runner(bench.request), HipGraphRunner)
    assert not inspect.isabstract(HipGraphRunner)
