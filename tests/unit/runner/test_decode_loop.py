# SPDX-License-Identifier: Apache-2.0
"""A recorded loop gives the tokens of staged passes, and sends what changed and no more."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from bedplate.batch.forward_mode import CaptureHiddenMode, ForwardMode
from bedplate.batch.schedule_batch import ScheduleBatch
from bedplate.contract import GraphRunnerRequest
from bedplate.reference.ops import OPERATIONS
from bedplate.registry.decisions import DecisionLog
from bedplate.registry.ops import Operations
from bedplate.runner.decode_loop import DecodeLoop
from bedplate.runner.sampling_params import SamplingParams
from bedplate.testing.graphs import CountingRuntime, TapeGraphRunner
from bedplate.testing.tiny_decoder import TinyAttention, TinyDecoder
from bedplate.testing.tiny_decoder import decode_batch as any_decode_batch

SIZES = (1, 4)


def decode_batch(lengths, attention):
    """A pass whose positions follow from the lengths, as they do in an engine."""
    batch = any_decode_batch(lengths, attention)
    return replace(batch, positions=batch.seq_lens.long() - 1)


class Bench:
    def __init__(self, sizes=SIZES):
        runtime = CountingRuntime()
        self.attention = TinyAttention()
        self.model = TinyDecoder(self.attention)
        ops = Operations(OPERATIONS, DecisionLog(), "test")
        self.loop = DecodeLoop(
            runtime, ops, self.attention.req_to_token, max_batch_size=sizes[-1], fill_len=1,
            dtype="float32",
        )  # fmt: skip
        self.runner = TapeGraphRunner(
            GraphRunnerRequest(
                runtime=runtime, forward=self.loop.sampled(self.model), begin=self.loop.begin,
                attention=self.attention,
                capture_sizes=sizes, hidden_modes=(CaptureHiddenMode.NULL,),
                index_dtype="int64", record=lambda _: None,
            )
        )  # fmt: skip
        self.runner.capture()

    def schedule(self, batch, slots=None):
        """The host's half of a device batch."""
        return ScheduleBatch(
            mode=ForwardMode.DECODE,
            req_pool_indices=batch.req_pool_indices.numpy(),
            seq_lens=batch.seq_lens.numpy(),
            input_ids=batch.input_ids.numpy(),
            positions=batch.positions.numpy(),
            out_cache_loc=batch.out_cache_loc.int().numpy() if slots is None else slots,
        )

    def staged(self, batch):
        with torch.no_grad():
            self.attention.prepare_in_graph(batch)
            return self.model(batch).next_token_logits.clone()

    def replay(self, resident):
        with torch.no_grad():
            assert self.runner.can_run(resident)
            return self.runner.replay(resident)


@pytest.fixture
def bench():
    return Bench()


@pytest.mark.parametrize("lengths", [[5], [3, 7], [2, 9, 4]])
def test_a_loaded_batch_gives_what_a_staged_one_gives(bench, lengths):
    batch = decode_batch(lengths, bench.attention)
    bench.loop.last_tokens[batch.req_pool_indices.long()] = batch.input_ids
    output = bench.replay(bench.loop.load(bench.schedule(batch), bench.runner))
    expected = bench.staged(batch)
    torch.testing.assert_close(output.next_token_logits, expected)
    assert output.tokens.tolist() == expected.argmax(-1).tolist()
    kept = bench.loop.last_tokens[batch.req_pool_indices.long()]
    assert kept.tolist() == output.tokens.tolist()


def test_only_changes_are_sent():
    bench = Bench((8,))
    rows, lens = np.arange(1, 7, dtype=np.int32), np.full(6, 3, np.int32)
    slots = np.arange(10, 70, 10, dtype=np.int32)

    def sent(rows, lens, slots):
        batch = ScheduleBatch(
            mode=ForwardMode.DECODE, req_pool_indices=rows, seq_lens=lens,
            input_ids=lens.astype(np.int64), positions=lens.astype(np.int64) - 1,
            out_cache_loc=slots,
        )  # fmt: skip
        before = bench.loop.sent_bytes
        resident = bench.loop.load(batch, bench.runner)
        bench.replay(resident)
        assert resident.seq_lens.tolist() == lens.tolist()
        assert resident.out_cache_loc.tolist() == slots.tolist()
        assert resident.req_pool_indices.tolist() == rows.tolist()
        return bench.loop.sent_bytes - before

    assert sent(rows, lens, slots) == 16 + 6 * 16  # all are new
    assert sent(rows, lens + 1, slots + 1) == 16  # no change, and that is news
    assert sent(rows, lens + 2, slots + 2) == 0
    turned = slots + 3
    turned[2] = 90
    assert sent(rows, lens + 3, turned) == 16 + 16  # one page turned
    turned = turned + 1
    assert sent(rows, lens + 4, turned) == 16
    keep = [0, 1, 5, 3, 4]
    assert sent(rows[keep], lens[keep] + 5, (turned + 1)[keep]) == 16 + 16  # one left
    bench.loop.hold()
    assert bench.loop.sent_bytes > 0
    assert sent(rows[keep], lens[keep] + 6, (turned + 2)[keep]) == 16 + 5 * 16  # after another


def test_a_capture_makes_the_mirror_stale(bench):
    batch = decode_batch([4, 5], bench.attention)
    first = bench.replay(bench.loop.load(bench.schedule(batch), bench.runner))
    expected = first.next_token_logits.clone()
    bench.runner.capture_one_batch_size(bench.runner.captured[0])
    back = bench.schedule(batch)
    bench.loop.last_tokens[batch.req_pool_indices.long()] = torch.tensor([0, 0])
    output = bench.replay(bench.loop.load(back, bench.runner))
    torch.testing.assert_close(output.next_token_logits, expected)


def test_a_foreign_batch_is_replayed_as_it_is(bench):
    batch = decode_batch([4, 5, 6], bench.attention)
    expected = bench.staged(batch)
    bench.loop.hold()
    with torch.no_grad():
        assert bench.runner.can_run(batch)
        output = bench.runner.replay(batch)
    torch.testing.assert_close(output.next_token_logits, expected)


def test_settings_reach_the_device_once(bench):
    loop = bench.loop
    params = {"temperature": 0.5, "top_k": 7, "top_p": 0.25, "min_p": 0.125, "seed": 2**63 - 1}
    loop.set_request(2, SamplingParams(**params))
    loop.set_request(3, SamplingParams())
    assert not loop.tables.temperature.any()
    loop.send_settings()
    tables = loop.tables
    assert {name: getattr(tables, name)[2].item() for name in params} == params
    assert tables.temperature[3] == 0.0
    sent = loop.sent_bytes
    loop.send_settings()
    assert loop.sent_bytes == sent


def test_random_life(bench):
    """Members join and leave in any order; rows on the device are always the scheduler's."""
    rng = random.Random(1)
    members = {}
    for _ in range(80):
        staying = {r: m for r, m in members.items() if rng.random() < 0.85 and m[0] < 11}
        members = {
            row: (length + 1, slot + 1 if rng.random() < 0.7 else rng.randrange(100))
            for row, (length, slot) in staying.items()
        }
        while len(members) < SIZES[-1] and rng.random() < 0.5:
            members[rng.choice([r for r in range(1, 6) if r not in members])] = (
                rng.randrange(1, 9), rng.randrange(100),
            )  # fmt: skip
        if not members:
            continue
        if rng.random() < 0.1:
            bench.loop.hold()
        rows, (lens, slots) = [*members], zip(*members.values(), strict=True)
        batch = ScheduleBatch(
            mode=ForwardMode.DECODE,
            req_pool_indices=np.array(rows, np.int32),
            seq_lens=np.array(lens, np.int32),
            input_ids=np.zeros(len(rows), np.int64),
            positions=np.array(lens, np.int64) - 1,
            out_cache_loc=np.array(slots, np.int32),
        )
        resident = bench.loop.load(batch, bench.runner)
        bench.replay(resident)
        assert resident.req_pool_indices.tolist() == rows
        assert resident.seq_lens.tolist() == list(lens)
        assert resident.out_cache_loc.tolist() == list(slots)
        assert resident.seq_lens_cpu.tolist() == list(lens)
