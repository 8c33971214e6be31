# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import gc

import pytest
import torch

from bedplate.batch.forward_batch import ExtendPart
from bedplate.batch.forward_mode import CaptureHiddenMode, ForwardMode
from bedplate.batch.logits import LogitsOutput
from bedplate.errors import CaptureError, ContractError, ReplayError
from bedplate.graph.capture_state import get_is_capture_mode
from bedplate.graph.keys import Refusal, ShapeKey
from bedplate.testing.graphs import TapeGraphRunner

NULL, LAST, FULL = CaptureHiddenMode
SIZES = (1, 2, 4, 8)


def decode_key(size, hidden=NULL):
    return ShapeKey(mode=ForwardMode.DECODE, batch_size=size, hidden_mode=hidden)


def poison(runner, bucket):
    """Put legal but wrong values into every slot, as an earlier batch might have left."""
    captured = runner._graphs[decode_key(bucket)]
    for name, value in (
        ("input_ids", 7),
        ("positions", 5),
        ("req_pool_indices", 9),
        ("seq_lens", 11),
        ("seq_lens_cpu", 11),
        ("out_cache_loc", 100),
    ):
        getattr(captured.batch, name).fill_(value)


# Replay equals eager.


@pytest.mark.parametrize("size", range(1, 9))
def test_replay_equals_eager_at_every_size(bench, size):
    it = bench().captured()
    batch = it.batch([3 + i for i in range(size)], seed=size)
    expected = it.eager(batch).next_token_logits
    logits = it.replay(batch).next_token_logits
    assert logits.shape == (size, 32)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("size", [1, 3, 5, 8])
def test_poisoned_slots_change_neither_logits_nor_the_cache(bench, size):
    it = bench().captured()
    batch = it.batch([4] * size)
    expected = it.eager(batch).next_token_logits
    cache = it.attention.keys[1:].clone()
    poison(it.runner, 8)
    torch.testing.assert_close(it.replay(batch).next_token_logits, expected)
    torch.testing.assert_close(it.attention.keys[1:], cache)


def test_padding_rows_touch_only_row_0_and_slot_0(bench):
    it = bench().captured()
    poison(it.runner, 8)
    it.replay(it.batch([4] * 5))
    padded = it.attention.prepared[-1]
    assert padded.batch_size == 8
    assert padded.req_pool_indices.tolist()[5:] == [0] * 3
    assert padded.out_cache_loc.tolist()[5:] == [0] * 3
    assert padded.positions.tolist()[5:] == [0] * 3
    assert padded.input_ids.tolist()[5:] == [0] * 3
    assert padded.seq_lens.tolist() == padded.seq_lens_cpu.tolist() == [4] * 5 + [1] * 3
    padded.check()


def test_lengths_that_grow_after_the_capture_are_seen(bench):
    it = bench().captured()
    for length in range(2, 12):
        batch = it.batch([length, 3], seed=length)
        expected = it.eager(batch).next_token_logits
        torch.testing.assert_close(it.replay(batch).next_token_logits, expected)
        assert it.runner.lengths == [length, 3]


def test_two_buckets_take_turns_in_one_pool(bench):
    it = bench().captured()
    for turn in range(4):
        for size in (7, 2, 8, 1):
            batch = it.batch([3 + turn] * size, seed=turn)
            expected = it.eager(batch).next_token_logits
            torch.testing.assert_close(it.replay(batch).next_token_logits, expected)


def test_output_is_a_view_that_the_next_replay_overwrites(bench):
    it = bench().captured()
    first = it.replay(it.batch([3] * 4)).next_token_logits
    kept = first.clone()
    second = it.replay(it.batch([5] * 2, seed=1)).next_token_logits
    assert first.data_ptr() == second.data_ptr()
    assert not torch.equal(first, kept)


def test_output_object_is_made_once_per_size(bench):
    it = bench().captured()
    assert it.replay(it.batch([3] * 3)) is it.replay(it.batch([4] * 3))


def test_output_that_moves_is_cut_afresh(bench):
    class Moving(TapeGraphRunner):
        def replay_graph(self, graph):
            super().replay_graph(graph)
            return LogitsOutput(next_token_logits=torch.full((4, 32), 1.5))

    it = bench(runner_type=Moving).captured()
    assert it.replay(it.batch([3] * 3)).next_token_logits.tolist() == [[1.5] * 32] * 3


def test_page_table_is_loaded_and_padded(bench):
    it = bench(changes={"max_pages": 3}).captured()
    table = torch.ones(3, 2, dtype=torch.int32)
    it.replay(dataclasses.replace(it.batch([3] * 3), page_table=table))
    padded = it.attention.prepared[-1]
    assert padded.page_table.tolist() == [[1, 1, 0]] * 3 + [[0, 0, 0]]


def test_out_cache_loc_has_the_declared_dtype(bench):
    it = bench(changes={"index_dtype": "int32"}).captured()
    batch = it.batch([3])
    batch = dataclasses.replace(batch, out_cache_loc=batch.out_cache_loc.int())
    assert it.attention.prepared[-1].out_cache_loc.dtype == torch.int32
    expected = it.eager(batch).next_token_logits
    torch.testing.assert_close(it.replay(batch).next_token_logits, expected)


def test_replaced_weight_is_noticed_and_updated_weight_is_used(bench):
    it = bench().captured()
    batch = it.batch([3])
    with torch.no_grad():
        it.model.embedding.mul_(0.5)
    expected = it.eager(batch).next_token_logits
    torch.testing.assert_close(it.replay(batch).next_token_logits, expected)
    it.model.embedding.data = it.model.embedding.data.clone()
    with pytest.raises(ReplayError, match="moved"):
        it.replay(batch)


# Capture.


def test_captures_largest_first_after_two_warm_ups_each(bench):
    it = bench().captured()
    captures = [size for call, size in it.runner.events if call == "capture"]
    assert captures == [8, 4, 2, 1]
    assert [batch.batch_size for batch in it.seen] == [8] * 3 + [4] * 3 + [2] * 3 + [1] * 3
    assert it.runtime.calls["synchronize"] == 2 * 4
    assert it.progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [key.batch_size for key in it.runner.captured] == [8, 4, 2, 1]


def test_replay_does_not_synchronize(bench):
    it = bench().captured()
    before = it.runtime.calls["synchronize"]
    it.replay(it.batch([3] * 3))
    assert it.runtime.calls["synchronize"] == before


def test_capture_runs_on_a_dummy_batch_even_between_replays(bench):
    """A capture in between must not write to the slots of live requests."""
    it = bench().captured()
    it.replay(it.batch([4] * 8))
    cache = it.attention.keys[1:].clone()
    it.seen.clear()
    it.runner.capture_one_batch_size(decode_key(8))
    torch.testing.assert_close(it.attention.keys[1:], cache)
    assert it.seen[0].out_cache_loc.tolist() == [0] * 8
    assert it.seen[0].req_pool_indices.tolist() == [0] * 8
    assert it.seen[0].seq_lens.tolist() == [1] * 8
    batch = it.batch([5] * 8)
    expected = it.eager(batch).next_token_logits
    torch.testing.assert_close(it.replay(batch).next_token_logits, expected)


def test_fill_length_is_the_attentions(bench):
    it = bench()
    it.attention.seq_len_fill_value = 0
    it.captured()
    assert it.seen[0].seq_lens.tolist() == it.seen[0].seq_lens_cpu.tolist() == [0] * 8


def test_flag_is_set_while_warming_up_and_capturing_only(bench):
    it = bench()
    flags = []
    forward = it.runner.request.forward
    request = it.request(forward=lambda b: flags.append(get_is_capture_mode()) or forward(b))
    runner = TapeGraphRunner(request)
    runner.capture()
    assert flags == [True] * 12
    assert not get_is_capture_mode()


def test_memory_is_the_difference_that_the_runtime_sees(bench):
    class Hungry(TapeGraphRunner):
        def create_graph(self, key):
            self.request.runtime.free_bytes -= 1000
            return super().create_graph(key)

    it = bench(runner_type=Hungry).captured()
    assert it.runner.memory_bytes == 4000
    assert it.runtime.calls["empty_cache"] >= 1


def test_memory_that_someone_else_freed_is_not_negative(bench):
    class Generous(TapeGraphRunner):
        def create_graph(self, key):
            self.request.runtime.free_bytes += 1000
            return super().create_graph(key)

    assert bench(runner_type=Generous).captured().runner.memory_bytes == 0


def test_gc_is_frozen_during_capture_unless_enabled(bench):
    counts = []

    class Watching(TapeGraphRunner):
        def create_graph(self, key):
            counts.append(gc.get_freeze_count() > 0)
            return super().create_graph(key)

    bench(runner_type=Watching, sizes=(1,)).captured()
    bench(runner_type=Watching, sizes=(1,), changes={"options": {"enable_gc": True}}).captured()
    assert counts == [True, False]
    assert gc.get_freeze_count() == 0


def test_stream_is_entered_once_around_all_captures(bench):
    class Streamed(TapeGraphRunner):
        def capture_stream(self):
            runner = self

            class Stream:
                def __enter__(self):
                    runner.events.append(("enter", 0))

                def __exit__(self, *_):
                    runner.events.append(("exit", 0))

            return Stream()

    events = bench(runner_type=Streamed, sizes=(1, 2)).captured().runner.events
    assert events[0] == ("enter", 0)
    assert events[-1] == ("exit", 0)
    assert len(events) == 2 + 2 * 2


class BareRunner(TapeGraphRunner):
    """Only what is required: the optional primitives are the base's."""

    pool_handle = TapeGraphRunner.__mro__[1].pool_handle
    update_host_parameters = TapeGraphRunner.__mro__[1].update_host_parameters

    def capture_graph(self, graph, run):
        with graph:
            return run()


def test_three_primitives_are_enough(bench):
    it = bench(runner_type=BareRunner).captured()
    assert it.runner.pool is None
    batch = it.batch([3, 4, 5])
    expected = it.eager(batch).next_token_logits
    torch.testing.assert_close(it.replay(batch).next_token_logits, expected)


# Failing captures.


def test_a_larger_graph_serves_a_failed_bucket_and_the_others_go_on(bench):
    it = bench()
    it.runner.fail_sizes = {4}
    it.captured()
    assert not get_is_capture_mode()
    assert [key.batch_size for key in it.runner.captured] == [8, 2, 1]
    assert it.progress[-1] == (4, 4)
    (decision,) = it.decisions
    assert decision.point == "graph.4"
    assert decision.chosen == "graph for 8"
    assert "injected capture failure" in decision.candidates[0].reason
    for size, bucket in ((2, 2), (3, 8), (5, 8)):
        assert it.runner.bucket_of(it.batch([3] * size)) == bucket
    batch = it.batch([3, 4, 5])
    expected = it.eager(batch).next_token_logits
    torch.testing.assert_close(it.replay(batch).next_token_logits, expected)


def test_a_failed_largest_bucket_runs_eagerly(bench):
    it = bench()
    it.runner.fail_sizes = {8}
    it.captured()
    assert it.decisions[0].chosen == "eager"
    assert it.runner.can_run(it.batch([3] * 5)).reason == Refusal.CAPTURE_FAILED
    assert it.runner.can_run(it.batch([3] * 4))


def test_all_captures_failing_leaves_everything_eager(bench):
    it = bench()
    it.runner.fail_sizes = set(SIZES)
    it.captured()
    assert [decision.point for decision in it.decisions] == [
        "graph.8",
        "graph.4",
        "graph.2",
        "graph.1",
    ]
    assert it.runner.can_run(it.batch([3])).reason == Refusal.CAPTURE_FAILED


def test_host_read_in_the_model_is_a_capture_failure(bench):
    it = bench()
    runner = TapeGraphRunner(it.request(forward=lambda batch: batch.seq_lens[0].item()))
    with pytest.raises(CaptureError, match="waits for the device") as raised:
        runner.capture_one_batch_size(decode_key(2))
    assert raised.value.key == decode_key(2)
    assert not get_is_capture_mode()
    assert runner.captured == ()


def test_a_bucket_that_failed_may_be_captured_later(bench):
    it = bench(sizes=(1,))
    it.runner.fail_sizes = {1}
    it.captured()
    it.runner.fail_sizes = set()
    it.runner.capture_one_batch_size(decode_key(1))
    assert it.runner.can_run(it.batch([3]))


def test_interrupt_is_not_swallowed_and_restores_everything(bench):
    class Interrupted(TapeGraphRunner):
        def create_graph(self, key):
            raise KeyboardInterrupt

    it = bench(runner_type=Interrupted)
    with pytest.raises(KeyboardInterrupt):
        it.runner.capture()
    assert not get_is_capture_mode()
    assert gc.get_freeze_count() == 0


# Which batches have a graph.


def extend_part():
    one = torch.ones(1, dtype=torch.int32)
    return ExtendPart(
        seq_lens=one, prefix_lens=one, start_loc=one, seq_lens_cpu=one, prefix_lens_cpu=one
    )


@pytest.mark.parametrize(
    ("lengths", "changes", "reason"),
    [
        ([3], {"mode": ForwardMode.EXTEND, "extend": extend_part()}, Refusal.MODE),
        ([3], {"mode": ForwardMode.IDLE}, Refusal.MODE),
        ([], {}, Refusal.EMPTY),
        ([3] * 9, {}, Refusal.TOO_LARGE),
        ([3], {"input_ids": torch.zeros(2, dtype=torch.int64)}, Refusal.TOKENS_PER_REQUEST),
        ([3], {"logits_rows": torch.zeros(1, dtype=torch.int64)}, Refusal.LOGITS_ROWS),
        ([3], {"page_table": torch.zeros(1, 3, dtype=torch.int32)}, Refusal.PAGE_TABLE),
        ([3], {"capture_hidden": LAST}, Refusal.HIDDEN_MODE),
        ([3], {"capture_hidden": FULL}, Refusal.HIDDEN_MODE),
    ],
)
def test_refusals_are_named_counted_and_enforced(bench, lengths, changes, reason):
    it = bench().captured()
    batch = dataclasses.replace(it.batch(lengths), **changes)
    support = it.runner.can_run(batch)
    assert not support
    assert support.reason == reason
    assert it.runner.stats.refusals == {reason: 1}
    with pytest.raises(ReplayError, match=reason):
        it.runner.replay(batch)
    assert it.runner.stats.replays == {}


def test_batch_without_the_page_table_that_was_captured_is_refused(bench):
    it = bench(changes={"max_pages": 3}).captured()
    assert it.runner.can_run(it.batch([3])).reason == Refusal.PAGE_TABLE


def test_nothing_runs_before_capture_or_after_release(bench):
    it = bench()
    assert it.runner.can_run(it.batch([3])).reason == Refusal.NOT_CAPTURED
    it.captured()
    assert it.runner.can_run(it.batch([3]))
    it.runner.release()
    assert it.runner.can_run(it.batch([3])).reason == Refusal.NOT_CAPTURED
    assert it.runner.captured == ()
    assert it.runner.memory_bytes == 0
    it.captured()
    batch = it.batch([4, 5])
    expected = it.eager(batch).next_token_logits
    torch.testing.assert_close(it.replay(batch).next_token_logits, expected)


def test_replays_are_counted_by_bucket(bench):
    it = bench().captured()
    for size in (1, 3, 4, 4):
        it.replay(it.batch([3] * size))
    assert it.runner.stats.replays == {1: 1, 4: 3}


@pytest.mark.parametrize(("size", "bucket"), [(1, 1), (3, 4), (8, 8), (9, None)])
def test_bucket_of_a_batch(bench, size, bucket):
    it = bench().captured()
    assert it.runner.bucket_of(it.batch([3] * size)) == bucket


def test_some_buckets_first_and_the_others_when_there_is_time(bench):
    it = bench()
    it.runner.capture(first=(1,))
    assert [key.batch_size for key in it.runner.captured] == [8, 1]
    batch = it.batch([3, 4])
    expected = it.eager(batch).next_token_logits
    assert it.runner.bucket_of(batch) == 8
    torch.testing.assert_close(it.replay(batch).next_token_logits, expected)
    before = it.runner.generation
    assert it.runner.capture_next(size=5)  # of a bucket that waits no more: nothing happens
    assert it.runner.generation == before
    assert it.runner.capture_next(size=2)
    assert it.runner.generation == before + 1
    assert it.runner.bucket_of(batch) == 2
    torch.testing.assert_close(it.replay(batch).next_token_logits, expected)
    assert not it.runner.capture_next()
    assert not it.runner.capture_next()
    assert {key.batch_size for key in it.runner.captured} == {1, 2, 4, 8}


def test_a_resident_batch_is_what_the_slots_hold(bench):
    it = bench().captured()
    batch = it.batch([3, 4, 5])
    expected = it.replay(batch).next_token_logits.clone()
    resident = it.runner.resident(3)
    assert resident is it.runner.resident(3)
    assert resident.seq_lens.tolist() == [3, 4, 5]
    torch.testing.assert_close(it.replay(resident).next_token_logits, expected)


def test_host_integers_are_part_of_the_key(bench):
    """A graph in which a length was baked as a Python number must not serve another."""
    it = bench(sizes=(1, 2))
    it.attention.graph_key = lambda batch: (int(batch.seq_lens_cpu.max()) // 8,)
    it.captured()
    assert {key.host_ints for key in it.runner.captured} == {(0,)}
    assert it.runner.can_run(it.batch([7]))
    refused = it.runner.can_run(it.batch([9]))
    assert refused.reason == Refusal.HOST_INTEGERS
    assert it.runner.can_run(it.batch([7]))


# Hidden states.


@pytest.mark.parametrize(
    ("captured", "wanted", "serves"),
    [
        ((NULL,), NULL, NULL),
        ((NULL,), LAST, None),
        ((NULL,), FULL, None),
        ((LAST,), FULL, None),
        ((FULL,), NULL, FULL),
        ((FULL,), LAST, FULL),
        ((FULL,), FULL, FULL),
        ((LAST,), LAST, LAST),
        ((NULL, FULL), NULL, NULL),
        ((FULL, NULL), LAST, FULL),
        ((NULL, LAST, FULL), LAST, LAST),
    ],
)
def test_hidden_mode_matrix(bench, captured, wanted, serves):
    it = bench(hidden=captured).captured()
    captures = len(it.runner.events)
    batch = it.batch([3, 5, 4], hidden=wanted)
    if serves is None:
        assert it.runner.can_run(batch).reason == Refusal.HIDDEN_MODE
        return
    expected = it.eager(batch)
    output = it.replay(batch)
    assert it.attention.prepared[-1].capture_hidden is serves
    torch.testing.assert_close(output.next_token_logits, expected.next_token_logits)
    if wanted is NULL:
        assert output.hidden_states is None
    else:
        torch.testing.assert_close(output.hidden_states, expected.hidden_states)
    assert [call for call, _ in it.runner.events[captures:]] == ["update", "replay"]


def test_alternating_hidden_modes_never_capture_again(bench):
    it = bench(hidden=(NULL, FULL)).captured()
    captures = len(it.runner.captured)
    assert captures == 8
    before = len([call for call, _ in it.runner.events if call == "capture"])
    for hidden in (NULL, FULL, NULL, FULL):
        it.replay(it.batch([3] * 3, hidden=hidden))
    assert len([call for call, _ in it.runner.events if call == "capture"]) == before


def test_failed_hidden_variant_is_recorded_under_its_own_point(bench):
    class NoHidden(TapeGraphRunner):
        def create_graph(self, key):
            if key.hidden_mode is FULL:
                raise RuntimeError("too large")
            return super().create_graph(key)

    it = bench(runner_type=NoHidden, hidden=(NULL, FULL), sizes=(2,)).captured()
    assert [decision.point for decision in it.decisions] == ["graph.2.full"]
    assert it.runner.can_run(it.batch([3]))
    refused = it.runner.can_run(it.batch([3], hidden=FULL))
    assert refused.reason == Refusal.CAPTURE_FAILED


# Several tokens per request.


class VerifyRunner(TapeGraphRunner):
    mode = ForwardMode.TARGET_VERIFY
    tokens_per_request = 3


def rows_as_output(batch):
    ids = batch.input_ids[:, None].float() + 0
    kept = {NULL: None, LAST: ids[2::3], FULL: ids + 0}[batch.capture_hidden]
    return LogitsOutput(next_token_logits=ids, hidden_states=kept)


@pytest.mark.parametrize(
    ("captured", "wanted", "hidden_rows"),
    [
        (NULL, NULL, None),
        (FULL, FULL, list(range(10, 19))),
        (FULL, LAST, [12, 15, 18]),
        (LAST, LAST, [12, 15, 18]),
    ],
)
def test_outputs_are_cut_by_tokens_not_by_requests(bench, captured, wanted, hidden_rows):
    changes = {"forward": rows_as_output}
    it = bench(runner_type=VerifyRunner, hidden=(captured,), changes=changes).captured()
    batch = dataclasses.replace(
        it.batch([5, 6, 7], hidden=wanted),
        mode=ForwardMode.TARGET_VERIFY,
        input_ids=torch.arange(10, 19),
        positions=torch.arange(9),
        out_cache_loc=torch.arange(9),
    )
    output = it.replay(batch)
    assert output.next_token_logits[:, 0].tolist() == list(range(10, 19))
    if hidden_rows is None:
        assert output.hidden_states is None
    else:
        assert output.hidden_states[:, 0].tolist() == hidden_rows
    assert it.attention.prepared[-1].input_ids.tolist()[9:] == [0] * 3


# Requests that make no sense.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capture_sizes": ()}, "ascending"),
        ({"capture_sizes": (0, 1)}, "ascending"),
        ({"capture_sizes": (4, 2)}, "ascending"),
        ({"capture_sizes": (2, 2)}, "ascending"),
        ({"hidden_modes": ()}, "hidden mode"),
        ({"index_dtype": "float32"}, "int32 or int64"),
    ],
)
def test_malformed_request_is_refused(bench, changes, message):
    with pytest.raises(ContractError, match=message):
        TapeGraphRunner(bench().request(**changes))


def test_progress_is_optional(bench):
    runner = TapeGraphRunner(bench().request(progress=None))
    runner.capture()
    assert len(runner.captured) == 4


def test_a_capture_after_a_failed_one_takes_another_pool(bench):
    """A device keeps recording into the pool of a broken capture and refuses it to the next."""
    pools = []

    class Named(TapeGraphRunner):
        def pool_handle(self):
            return [len(pools)]

        def capture_graph(self, graph, run):
            pools.append(self.pool)
            if len(pools) == 2:
                raise RuntimeError("broken")
            return run()

    runner = Named(bench().request())
    runner.capture()
    assert len(runner.captured) == len(pools) - 1
    assert pools[0] is pools[1]
    assert pools[2] is not pools[1]
    assert pools[2] is pools[3]
