# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from bedplate.batch.forward_mode import CaptureHiddenMode, ForwardMode
from bedplate.errors import ReplayError
from bedplate.graph.buckets import first_sizes
from bedplate.graph.keys import Refusal
from bedplate.graph.prompts import PromptGraphs, token_sizes
from bedplate.testing.graphs import CountingRuntime
from bedplate.testing.tiny_decoder import prompt_batch

SIZES = (4, 8, 12)


@pytest.fixture
def made(bench):
    """A bench, and prompt graphs of three sizes and three requests on its runner."""
    it = bench()
    prompts = PromptGraphs(it.runner, it.forward, sizes=SIZES, max_requests=3)
    return it, prompts


def replay(it, prompts, batch):
    assert prompts.can_run(batch)
    with it.runtime.inference_guard():
        return prompts.replay(batch).next_token_logits


# Sizes.


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [
        (1, (1,)),
        (40, (32, 40)),
        (256, (32, 64, 128, 192, 256)),
        (600, (32, 64, 128, 192, 256, 320, 384, 448, 512, 600)),
        (9000, (32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536,
                1792, 2048, 2560, 3072, 3584, 4096)),
    ],
)  # fmt: skip
def test_sizes(limit, sizes):
    assert token_sizes(limit) == sizes


def test_first_sizes_are_powers_of_two_and_the_largest():
    assert first_sizes(token_sizes(600)) == (32, 64, 128, 256, 512, 600)


@pytest.mark.parametrize("limit", range(64, 5000, 37))
def test_padding_stays_below_half_and_from_256_on_below_a_fifth(limit):
    sizes = token_sizes(limit)
    for smaller, larger in pairwise(sizes):
        assert (smaller + 1) / larger > (0.8 if smaller >= 256 else 0.5)


# Replay equals eager.


@pytest.mark.parametrize(
    ("counts", "prefixes"),
    [([1], [0]), ([4], [0]), ([5], [3]), ([3, 4], [0, 2]), ([1, 1, 1], [5, 0, 2]),
     ([4, 1, 7], [0, 9, 1]), ([12], [0])],
)  # fmt: skip
def test_replay_equals_eager(made, counts, prefixes):
    it, prompts = made
    prompts.capture(SIZES)
    for seed in range(2):  # the second time over what the first left
        batch = prompt_batch(counts, it.attention, prefixes=prefixes, seed=seed)
        it.attention.keys[0] = it.attention.values[0] = float("nan")  # where padding goes
        expected = it.eager(batch).next_token_logits
        cache = it.attention.keys[1:].clone()
        logits = replay(it, prompts, batch)
        assert logits.shape == (len(counts), 32)
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(it.attention.keys[1:], cache)


def test_nothing_of_a_longer_batch_is_left(made):
    it, prompts = made
    prompts.capture(SIZES[-1:])
    replay(it, prompts, prompt_batch([4, 4, 4], it.attention, prefixes=[3, 3, 3]))
    replay(it, prompts, prompt_batch([9], it.attention))
    padded = it.attention.prepared[-1]
    padded.check()
    assert padded.extend.seq_lens.tolist() == padded.extend.seq_lens_cpu.tolist() == [9, 0, 0]
    assert padded.extend.prefix_lens.tolist() == padded.extend.start_loc.tolist() == [0] * 3
    assert padded.req_pool_indices.tolist() == [1, 0, 0]
    assert padded.seq_lens.tolist() == padded.seq_lens_cpu.tolist() == [9, 0, 0]
    assert padded.out_cache_loc.tolist()[9:] == padded.positions.tolist()[9:] == [0] * 3
    assert padded.input_ids.tolist()[9:] == [0] * 3
    assert padded.logits_rows.tolist() == [8, 0, 0]


def test_decode_and_prompts_take_turns_in_one_pool(made):
    it, prompts = made
    prompts.capture(SIZES)
    it.runner.capture()
    for turn in range(3):
        prompt = prompt_batch([3 + turn], it.attention, seed=turn)
        expected = it.eager(prompt).next_token_logits
        torch.testing.assert_close(replay(it, prompts, prompt), expected)
        step = it.batch([3 + turn] * 5, seed=turn)
        expected = it.eager(step).next_token_logits
        torch.testing.assert_close(it.replay(step).next_token_logits, expected)


# Which graph.


def test_the_largest_first_and_a_pass_takes_the_next_size(made):
    it, prompts = made
    prompts.capture((4, 12))
    assert [event for event in it.runner.events if event[0] == "capture"] == [
        ("capture", 3)
    ] * 2
    assert prompts.captured == (4, 12)
    assert prompts.bucket_of(prompt_batch([3], it.attention)) == 4
    assert prompts.bucket_of(prompt_batch([11], it.attention)) == 12
    replay(it, prompts, prompt_batch([3], it.attention))
    assert dict(prompts.stats.replays) == {4: 1}


def test_a_size_that_waits_is_recorded_when_idle_or_when_missed_often(made):
    it, prompts = made
    prompts.capture((4, 12))
    batch = prompt_batch([7], it.attention)
    answer = prompts.can_run(batch)
    assert not answer
    assert answer.reason == Refusal.PADDING
    for _ in range(4):
        assert 8 not in prompts.captured
        prompts.capture_if_worth_it(batch)
    assert prompts.bucket_of(batch) == 8
    prompts.capture((4, 12))
    assert prompts.capture_next() is False
    assert prompts.bucket_of(batch) == 8


def test_little_padding_is_taken_at_once(made):
    it, prompts = made
    prompts.capture((4, 12))
    assert prompts.bucket_of(prompt_batch([8, 1], it.attention)) == 12


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mode": ForwardMode.TARGET_VERIFY}, Refusal.MODE),
        ({"logits_rows": None}, Refusal.LOGITS_ROWS),
        ({"logits_rows": torch.zeros(4, dtype=torch.int64)}, Refusal.LOGITS_ROWS),
        ({"capture_hidden": CaptureHiddenMode.LAST}, Refusal.HIDDEN_MODE),
        ({"page_table": torch.zeros(1, 1, dtype=torch.int32)}, Refusal.PAGE_TABLE),
    ],
)
def test_refusals(made, changes, reason):
    it, prompts = made
    prompts.capture(SIZES)
    batch = dataclasses.replace(prompt_batch([3], it.attention), **changes)
    assert prompts.can_run(batch).reason == reason
    assert prompts.stats.refusals == {reason: 1}
    with pytest.raises(ReplayError, match=str(reason)):
        prompts.replay(batch)


@pytest.mark.parametrize("counts", [[12, 1], [1, 1, 1, 1]])
def test_more_tokens_or_requests_than_recorded(made, counts):
    it, prompts = made
    batch = prompt_batch(counts, it.attention)
    assert prompts.can_run(batch).reason == Refusal.NOT_CAPTURED
    prompts.capture(SIZES)
    assert prompts.can_run(batch).reason == Refusal.TOO_LARGE


def test_a_capture_that_fails_is_recorded_and_no_other_tried(made):
    it, prompts = made
    it.runner.fail_sizes = {3}
    prompts.capture(SIZES)
    assert prompts.captured == ()
    assert len(it.decisions) == 1
    assert (it.decisions[0].point, it.decisions[0].chosen) == ("prompt_graph.12", "eager")
    assert "injected" in it.decisions[0].candidates[0].reason
    assert not prompts.capture_next()


def test_a_pass_is_recorded_with_requests_as_long_as_there_can_be(bench, monkeypatch):
    it = bench()
    seen, prepare = [], it.attention.prepare

    def look(batch):
        batch.check()
        seen.append((batch.extend.seq_lens_cpu.tolist(), batch.extend.start_loc.tolist()))
        prepare(batch)

    monkeypatch.setattr(it.attention, "prepare", look)
    prompts = PromptGraphs(it.runner, it.forward, sizes=(4, 12), max_requests=3, longest=5)
    prompts.capture((4, 12))
    assert seen == [([5, 5, 2], [0, 5, 10]), ([4, 0, 0], [0, 0, 0])]
    batch = prompt_batch([5, 2, 5], it.attention, prefixes=[1, 0, 4])
    expected = it.eager(batch).next_token_logits
    torch.testing.assert_close(replay(it, prompts, batch), expected)


def test_rehearsal_runs_every_size_and_records_none(made):
    it, prompts = made
    prompts.rehearse()
    assert [batch.num_tokens for batch in it.seen] == list(SIZES)
    assert prompts.captured == ()


class Clocked(CountingRuntime):
    """Work takes the device ``seconds_a_token`` after it was launched."""

    def __init__(self, clock, seconds_a_token):
        super().__init__()
        self.clock, self.seconds_a_token, self.tokens = clock, seconds_a_token, 0

    def synchronize(self):
        self.clock.now += self.tokens * self.seconds_a_token
        self.tokens = 0


@pytest.mark.parametrize(
    ("seconds_a_token", "sizes"),
    [(0.0, SIZES), (0.2 / 12, SIZES), (0.2 / 8, (4, 8)), (0.2 / 4, (4,)), (1.0, ())],
)
def test_only_what_waits_for_the_host_is_worth_it(made, monkeypatch, seconds_a_token, sizes):
    """Launching takes the host a second here."""
    it, prompts = made
    clock = SimpleNamespace(now=0.0)
    runtime = Clocked(clock, seconds_a_token)
    it.runner.request = dataclasses.replace(it.runner.request, runtime=runtime)

    def forward(batch):
        clock.now += 1.0
        runtime.tokens += batch.num_tokens
        return it.forward(batch)

    prompts._forward = forward
    monkeypatch.setattr("bedplate.graph.prompts.perf_counter", lambda: clock.now)
    assert prompts.worth_it() == sizes
