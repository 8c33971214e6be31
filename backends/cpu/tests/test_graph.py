# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bedplate.batch.forward_mode import CaptureHiddenMode
from bedplate.contract.graph import GraphRunnerRequest
from bedplate.graph.capture_state import get_is_capture_mode
from bedplate.graph.keys import Refusal
from bedplate.testing.graphs import CountingRuntime
from bedplate.testing.tiny_decoder import TinyAttention, TinyDecoder, decode_batch
from bedplate_cpu.graph import CompiledRunner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bedplate.contract.decisions import Decision

NULL, LAST, _ = CaptureHiddenMode


class Bench:
    def __init__(self, sizes: tuple[int, ...] = (1, 2, 4), **changes: Any) -> None:
        self.attention = TinyAttention()
        self.model = TinyDecoder(self.attention)
        self.decisions: list[Decision] = []
        request = GraphRunnerRequest(
            runtime=CountingRuntime(),
            forward=self.model,
            attention=self.attention,
            capture_sizes=sizes,
            hidden_modes=(NULL,),
            index_dtype="int32",
            record=self.decisions.append,
        )
        self.runner = CompiledRunner(dataclasses.replace(request, **changes))

    def compare(self, lengths: list[int], **options: Any) -> None:
        batch = decode_batch(lengths, self.attention, **options)
        with torch.no_grad():
            self.attention.prepare_in_graph(batch)
            expected = self.model(batch)
            assert self.runner.can_run(batch)
            output = self.runner.replay(batch)
        torch.testing.assert_close(output.next_token_logits, expected.next_token_logits)
        if expected.hidden_states is None:
            assert output.hidden_states is None
        else:
            torch.testing.assert_close(output.hidden_states, expected.hidden_states)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without code generation: the same seam and life, in little time."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile_(f, backend="eager", **options)
    )
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("traced_only")
def test_compiled_replay_equals_eager_with_padding_and_growing_lengths():
    bench = Bench()
    bench.runner.capture()
    assert bench.decisions == []
    for turn in range(3):
        for size in (3, 1, 4, 2):
            bench.compare([2 + turn + i for i in range(size)], seed=turn)


@pytest.mark.usefixtures("traced_only")
def test_no_code_is_compiled_after_capture():
    bench = Bench()
    bench.runner.capture()
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in range(2, 8):
            bench.compare([length, 3, 3])


@pytest.mark.usefixtures("traced_only")
def test_more_buckets_than_the_compilers_usual_limit():
    bench = Bench(sizes=tuple(range(1, 13)))
    bench.runner.capture()
    assert bench.decisions == []
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in range(1, 13):
            bench.compare([3] * size)


@pytest.mark.usefixtures("traced_only")
def test_hidden_states():
    bench = Bench(sizes=(2,), hidden_modes=(NULL, LAST))
    bench.runner.capture()
    bench.compare([3], hidden=LAST)
    bench.compare([4, 5])


@pytest.mark.usefixtures("traced_only")
def test_release_gives_attention_back():
    bench = Bench(sizes=(1,))
    before = dict(vars(bench.attention))
    bench.runner.capture()
    assert "forward" in vars(bench.attention)
    bench.runner.release()
    assert vars(bench.attention).keys() == before.keys()
    bench.runner.capture()
    bench.compare([3])


@pytest.mark.usefixtures("traced_only")
def test_attention_call_that_warm_ups_did_not_make_fails_the_capture():
    bench = Bench(sizes=(1,))
    original = bench.runner.capture_graph

    def forgetful(graph, run):
        bench.runner._attention_seam.calls.clear()
        return original(graph, run)

    bench.runner.capture_graph = forgetful
    bench.runner.capture()
    (decision,) = bench.decisions
    assert "not seen in the warm-ups" in decision.candidates[0].reason


def test_failing_compiler_is_recorded_and_the_batch_runs_eagerly(monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    bench = Bench(sizes=(1, 2))
    bench.runner.capture()
    assert [decision.point for decision in bench.decisions] == ["graph.2", "graph.1"]
    assert all("no C++ compiler" in d.candidates[0].reason for d in bench.decisions)
    assert not get_is_capture_mode()
    batch = decode_batch([3], bench.attention)
    assert bench.runner.can_run(batch).reason == Refusal.CAPTURE_FAILED


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own
def test_generated_code_equals_eager():
    torch._dynamo.reset()
    bench = Bench(sizes=(1, 4))
    bench.runner.capture()
    assert bench.decisions == []
    for size in (1, 2, 3, 4):
        bench.compare([3 + i for i in range(size)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own
def test_missing_host_compiler_falls_to_eager(monkeypatch, tmp_path):
    from torch._inductor import config

    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(config.cpp, "cxx", (None, os.fspath(tmp_path / "no-compiler")))
    monkeypatch.setattr(config, "fx_graph_cache", False)
    bench = Bench(sizes=(1,))
    bench.runner.capture()
    (decision,) = bench.decisions
    assert decision.point == "graph.1"
    assert "compiler" in decision.candidates[0].reason
    batch = decode_batch([3], bench.attention)
    assert bench.runner.can_run(batch).reason == Refusal.CAPTURE_FAILED
