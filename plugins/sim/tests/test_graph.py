# SPDX-License-Identifier: Apache-2.0
"""Recorded passes: equal to eager ones, and refused where a device would go wrong."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from bedplate.batch.forward_mode import CaptureHiddenMode
from bedplate.batch.logits import LogitsOutput
from bedplate.contract import GraphRunnerRequest
from bedplate.errors import CaptureError, ReplayError
from bedplate.testing.tiny_decoder import TinyAttention, TinyDecoder, decode_batch
from bedplate_sim.graph import SimGraphRunner
from bedplate_sim.races import RaceError

LENGTHS = [[1], [12], [3, 4], [5, 1, 9], [2] * 4]


def make_bench(runtime, **changes):
    """A runner around the smallest model that decodes."""
    attention = TinyAttention(device=runtime.device)
    model = TinyDecoder(attention, device=runtime.device)
    decisions = []
    request = GraphRunnerRequest(
        runtime=runtime,
        forward=model,
        attention=attention,
        capture_sizes=(1, 2, 4),
        hidden_modes=(CaptureHiddenMode.NULL,),
        index_dtype="int32",
        record=decisions.append,
    )
    runner = SimGraphRunner(dataclasses.replace(request, **changes))
    return SimpleNamespace(
        runtime=runtime, runner=runner, attention=attention, model=model, decisions=decisions
    )


def eager(bench, batch):
    with torch.no_grad():
        bench.attention.prepare_in_graph(batch)
        return bench.model(batch).next_token_logits


def same(logits, expected):
    """Products of other batch sizes round differently."""
    torch.testing.assert_close(logits.cpu(), expected.cpu(), atol=1e-4, rtol=1e-4)


def replayed(bench, lengths):
    batch = decode_batch(lengths, bench.attention)
    assert bench.runner.can_run(batch)
    with torch.no_grad():
        return batch, bench.runner.replay(batch).next_token_logits


def test_replay_equals_eager(runtime):
    bench = make_bench(runtime)
    bench.runner.capture()
    assert not bench.decisions
    for lengths in LENGTHS * 2:
        batch, logits = replayed(bench, lengths)
        same(logits, eager(bench, batch))


def test_a_capture_runs_nothing_and_a_replay_waits_its_turn(lazy):
    bench = make_bench(lazy)
    bench.runner.capture()
    lazy.synchronize()
    device = lazy.simulated
    before = [stream.launched for stream in device.streams]
    replayed(bench, [3])
    after = [stream.launched for stream in device.streams]
    assert device.home.done < device.home.launched
    assert after[0] - before[0] < 20, "a replay is one piece of work"
    assert after[1:] == before[1:]


def test_a_replay_destroys_the_results_of_the_one_before(runtime):
    bench = make_bench(runtime)
    bench.runner.capture()
    _, kept = replayed(bench, [3, 4])
    expected = kept.clone()
    replayed(bench, [5])
    assert not torch.equal(kept.cpu(), expected.cpu())


def test_graphs_share_one_pool(lazy):
    bench = make_bench(lazy)
    bench.runner.capture(first=())
    largest = len(bench.runner.pool.blocks)
    while bench.runner.capture_next():
        pass
    assert len(bench.runner.captured) == 3
    assert len(bench.runner.pool.blocks) == largest > 0


def test_released_graphs_give_their_memory_back(lazy):
    bench = make_bench(lazy)
    lazy.synchronize()
    lazy.empty_cache()
    before = lazy.memory()
    bench.runner.capture()
    assert lazy.memory().free_bytes < before.free_bytes
    bench.runner.release()
    bench.attention.prepared.clear()  # which keeps slots, and then what a graph made
    bench.attention._visible = bench.attention._rows = None
    lazy.synchronize()
    lazy.empty_cache()
    assert lazy.memory().free_bytes == before.free_bytes
    bench.runner.capture()
    batch, logits = replayed(bench, [2, 3])
    same(logits, eager(bench, batch))


ILLEGAL = {
    "aten._local_scalar_dense": lambda x, runtime: x.sum().item(),
    "aten._to_copy": lambda x, runtime: x.cpu(),
    "aten.nonzero": lambda x, runtime: x.nonzero(),
    "synchronize": lambda x, runtime: runtime.synchronize(),
    "Event.synchronize": lambda x, runtime: runtime.record_event().synchronize(),
    "aten.index": lambda x, runtime: x[torch.tensor([0])],
    "empty_host": lambda x, runtime: runtime.empty_host(8),
    "empty_cache": lambda x, runtime: runtime.empty_cache(),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_no_graph_can_hold_is_named(lazy, name):
    bench = make_bench(lazy)
    capturing = lazy.simulated

    def forward(batch):
        output = bench.model(batch)
        if capturing.tape is not None and batch.batch_size == 2:
            ILLEGAL[name](output.next_token_logits, lazy)
        return output

    bench.runner.request = dataclasses.replace(bench.runner.request, forward=forward)
    bench.runner.capture()
    (decision,) = bench.decisions
    assert decision.point == "graph.2"
    assert name in decision.candidates[0].reason
    assert decision.chosen == "graph for 4"
    batch, logits = replayed(bench, [3, 4])
    same(logits, eager(bench, batch))


def test_an_input_that_moved_is_refused(runtime):
    bench = make_bench(runtime)
    bench.runner.capture()
    replayed(bench, [3])
    bench.attention.keys = bench.attention.keys.clone()
    with pytest.raises(ReplayError, match=r"aten\.index.*given back after the capture"):
        replayed(bench, [3])


def test_an_input_that_was_made_for_the_capture_only_is_refused(lazy):
    bench = make_bench(lazy, capture_sizes=(1,))

    def forward(batch):
        logits = bench.model(batch).next_token_logits
        return LogitsOutput(next_token_logits=logits + passing[0])

    passing = [torch.ones(1, device=lazy.device)]
    bench.runner.request = dataclasses.replace(bench.runner.request, forward=forward)
    bench.runner.capture()
    passing.clear()
    with pytest.raises(ReplayError, match=r"aten\.add"):
        replayed(bench, [3])


def test_a_number_of_the_host_is_baked_in(lazy):
    """The reason for keys of host integers: a later value is not seen."""
    bench, scale = make_bench(lazy, capture_sizes=(1,)), [1.0]

    def forward(batch):
        return LogitsOutput(next_token_logits=bench.model(batch).next_token_logits * scale[0])

    bench.runner.request = dataclasses.replace(bench.runner.request, forward=forward)
    bench.runner.capture()
    scale[0] = 2.0
    batch, logits = replayed(bench, [3])
    same(logits, eager(bench, batch))


def test_a_capture_stream_without_a_wait_is_found(runtime):
    """Planted: the side stream neither waits for what was queued nor is waited for."""
    bench = make_bench(runtime)

    class Careless(SimGraphRunner):
        def capture_stream(self):
            return self._device.stream(self._stream)

    runner = Careless(bench.runner.request)
    runner.capture()
    assert not runner.captured
    assert all("still writes" in d.candidates[0].reason for d in bench.decisions)


def test_a_lost_wait_after_the_capture_is_found(runtime):
    """Planted: who replays does not wait for the side stream, where slots were filled."""
    bench = make_bench(runtime)

    class Careless(SimGraphRunner):
        def capture_stream(self):
            self._stream.wait(self._device.record_event())
            return self._device.stream(self._stream)

    bench.runner = Careless(bench.runner.request)
    bench.runner.capture()
    assert bench.runner.captured
    with pytest.raises(RaceError, match="still reads"):
        replayed(bench, [3])


@pytest.mark.parametrize("what", ["capture", "allocation"])
def test_a_capture_that_fails_leaves_the_others(lazy, what):
    bench = make_bench(lazy, capture_sizes=(1, 4))
    lazy.simulated.fail(what, 1 if what == "capture" else 60)
    bench.runner.capture()
    (decision,) = bench.decisions
    assert decision.candidates[0].verdict == "failed"
    assert len(bench.runner.captured) == 1


def test_a_replay_that_fails_is_an_error_of_its_pass(lazy):
    bench = make_bench(lazy)
    bench.runner.capture()
    lazy.simulated.fail("replay", 2)
    replayed(bench, [3])
    with pytest.raises(RuntimeError, match="at this replay"):
        replayed(bench, [3])
    batch, logits = replayed(bench, [3])
    same(logits, eager(bench, batch))


def test_other_threads_may_use_the_device_during_a_capture(take):
    import threading

    runtime = take(schedule="threaded")
    bench, sums = make_bench(runtime, capture_sizes=(1,)), []

    def forward(batch):
        thread = threading.Thread(
            target=lambda: sums.append(torch.ones(3, device=runtime.device).sum().item())
        )
        thread.start()
        thread.join()
        return bench.model(batch)

    bench.runner.request = dataclasses.replace(bench.runner.request, forward=forward)
    bench.runner.capture()
    assert not bench.decisions
    assert sums == [3.0] * 3


def test_captures_do_not_nest_by_accident(lazy):
    with (
        pytest.raises(CaptureError, match="synchronize"),
        lazy.simulated.capture(make_bench(lazy).runner.create_graph(None)),
    ):
        lazy.synchronize()
    lazy.synchronize()
