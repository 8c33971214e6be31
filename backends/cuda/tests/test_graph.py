# SPDX-License-Identifier: Apache-2.0
"""The graph runner's calls to torch, on a device that is pretended and records nothing."""

from __future__ import annotations

import inspect
from contextlib import contextmanager

import pytest
import torch
from kernels.tests.pools import Pool, as_tensor

from bedplate.batch.forward_mode import CaptureHiddenMode
from bedplate.contract import GraphRunnerRequest
from bedplate.graph.runner import GraphRunner
from bedplate.testing.graphs import CountingRuntime
from bedplate.testing.tiny_decoder import TinyAttention, TinyDecoder, decode_batch
from bedplate_cuda.graph import CudaGraphRunner

GRAPH = inspect.signature(torch.cuda.graph)


class FakeStream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class FakeGraph:
    """Runs the captured part again, into the results of the capture."""

    def replay(self):
        fresh = self.run()
        self.output.next_token_logits.copy_(fresh.next_token_logits)


@pytest.fixture
def log(monkeypatch):
    """What was asked of ``torch.cuda``, in order."""
    calls = []

    @contextmanager
    def use(stream):
        calls.append(f"enter {stream.name}")
        yield
        calls.append(f"leave {stream.name}")

    @contextmanager
    def record(*arguments, **options):
        bound = GRAPH.bind(*arguments, **options).arguments  # as the real one takes them
        mode = bound["capture_error_mode"]
        calls.append(f"capture {bound['pool']} {bound['stream'].name} {mode}")
        yield

    for name, fake in {
        "Stream": lambda _device: FakeStream("side", calls),
        "current_stream": lambda _device: FakeStream("home", calls),
        "stream": use,
        "graph": record,
        "CUDAGraph": FakeGraph,
        "graph_pool_handle": lambda: "pool",
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    return calls


class Runner(CudaGraphRunner):
    """Keeps what a graph must run again; results lie in its memory."""

    memory = None

    def capture_graph(self, graph, run):
        self.memory = self.memory or Pool()
        graph.run = run
        graph.output = super().capture_graph(graph, lambda: self.memory.place_results(run()))
        return graph.output


@pytest.fixture
def bench(log):
    attention = TinyAttention()
    model = TinyDecoder(attention)
    decisions = []
    request = GraphRunnerRequest(
        runtime=CountingRuntime(),
        forward=model,
        attention=attention,
        capture_sizes=(1, 4),
        hidden_modes=(CaptureHiddenMode.NULL,),
        index_dtype="int32",
        record=decisions.append,
    )
    runner = Runner(request)
    runner.capture()
    assert decisions == []
    return runner, attention, model


def test_captures_on_the_side_stream_into_one_pool(bench, log):
    assert log == [
        "side waits for home",
        "enter side",
        "capture pool side thread_local",
        "capture pool side thread_local",
        "leave side",
        "home waits for side",
    ]


def test_the_allocator_hears_of_a_pass_that_fails(bench, log, monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *given: told.append(given))

    def fail():
        raise ValueError("in the pass")

    with pytest.raises(ValueError, match="in the pass"):
        bench[0].capture_graph(FakeGraph(), fail)
    assert told == [(3, "pool")]


@pytest.mark.parametrize("lengths", [[3], [2, 5, 4], [1, 2, 3, 4]])
def test_replay_equals_eager(bench, lengths):
    runner, attention, model = bench
    batch = decode_batch(lengths, attention)
    with torch.no_grad():
        attention.prepare_in_graph(batch)
        expected = model(batch).next_token_logits
        assert runner.can_run(batch)
        torch.testing.assert_close(runner.replay(batch).next_token_logits, expected)


def test_results_of_all_graphs_share_their_memory(bench):
    runner, attention, _model = bench
    batches = [decode_batch(lengths, attention) for lengths in ([3], [1, 2, 3, 4])]
    first, second = (runner.replay(batch).next_token_logits for batch in batches)
    assert first.data_ptr() == second.data_ptr()
    assert runner.memory.most_bytes == second.nbytes


def test_nothing_is_left_abstract():
    assert issubclass(CudaGraphRunner, GraphRunner)
    assert not inspect.isabstract(CudaGraphRunner)
