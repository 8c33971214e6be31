# SPDX-License-Identifier: Apache-2.0
"""Mistakes of graph runners, over tapes."""

from __future__ import annotations

from dataclasses import replace

import torch
from tests.conformance.mutants.base import mutant

from bedplate.errors import CaptureError
from bedplate.testing import graphs
from bedplate.testing.graphs import RerunGraphRunner, Tape, TapeGraphRunner
from bedplate.testing.tiny_decoder import TinyAttention


def stale(field):
    """One slot is loaded for the first replay only."""

    class Stale(TapeGraphRunner):
        kept = None

        def replay_prepare(self, batch):
            fresh = getattr(batch, field)
            if self.kept is None or self.kept.shape != fresh.shape:
                self.kept = fresh.clone()
            return super().replay_prepare(replace(batch, **{field: self.kept}))

        def replay(self, batch):
            route = self.replay_prepare(batch)
            self.replay_graph(route.captured.graph)
            return route.output

    return Stale


class StaleTail(TapeGraphRunner):
    """Padding keeps what earlier batches left there."""

    def replay_prepare(self, batch):
        route = self._find(batch)
        slots = self._static_slots()
        size, rows = route.captured.key.batch_size, batch.batch_size
        kept = {n: t[rows:].clone() for n, t in slots.view(size).items()}
        route = super().replay_prepare(batch)
        for name, tail in kept.items():
            slots.view(size)[name][rows:] = tail
        return route


class PaddingRepeatsLastRow(TapeGraphRunner):
    """Padding writes where the last request does."""

    def replay_prepare(self, batch):
        route = super().replay_prepare(batch)
        rows = batch.batch_size
        for tensor in self._static_slots().view(route.captured.key.batch_size).values():
            tensor[rows:] = tensor[rows - 1]
        return route


class WeightsBaked(TapeGraphRunner):
    """A replay uses the weights of the capture."""

    def capture_graph(self, graph, run):
        output = super().capture_graph(graph, run)
        weight = self.request.forward.embedding
        graph.kept = weight.detach().clone()
        return output

    def replay_graph(self, graph):
        weight = self.request.forward.embedding
        now = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(graph.kept)
            super().replay_graph(graph)
            weight.copy_(now)


class NoReplay(TapeGraphRunner):
    """Gives the output of the capture."""

    def replay_graph(self, graph):
        pass


class CaptureRaises(TapeGraphRunner):
    """A bucket that fails ends the start."""

    def _try_capture(self, key):
        self.capture_one_batch_size(key)


class CaptureFailsSilently(TapeGraphRunner):
    """A bucket that fails is left out without a record."""

    def _try_capture(self, key):
        try:
            self.capture_one_batch_size(key)
        except CaptureError:
            self._failed.add(key)


class HostReadBaked(TapeGraphRunner):
    """Values that were read on the host are recorded as they were."""

    def create_graph(self, key):
        return Blind(key)


class Blind(Tape):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads, graphs._READS_HOST = graphs._READS_HOST, set()
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            graphs._READS_HOST = reads


class KeepsGraphs(TapeGraphRunner):
    """release() gives nothing back."""

    def release(self):
        if not self._graphs:
            super().release()


class ForgetsHidden(TapeGraphRunner):
    """Hidden states are not kept."""

    def capture_graph(self, graph, run):
        return replace(super().capture_graph(graph, run), hidden_states=None)


class WrongBucket(TapeGraphRunner):
    """Every batch is cut from the rows of the largest graph, one row too far."""

    def replay(self, batch):
        output = super().replay(batch)
        return replace(output, next_token_logits=output.next_token_logits.roll(1, 0))


class SharedOutput(TapeGraphRunner):
    """The pool holds half a block, so that large outputs overlap themselves."""

    def replay_graph(self, graph):
        super().replay_graph(graph)
        for block in self.pool:
            half = len(block) // 2
            block[:half] = block[half : 2 * half]


class FillsWithZero(TapeGraphRunner):
    """Padding has another length than attention asked for."""

    def replay_prepare(self, batch):
        route = super().replay_prepare(batch)
        view = self._static_slots().view(route.captured.key.batch_size)
        view["seq_lens"][batch.batch_size :] = 3
        return route


class LeakyReplay(TapeGraphRunner):
    """A replay writes the cache once more, at the slots of the replay before."""

    last = None

    def replay_graph(self, graph):
        super().replay_graph(graph)
        attention = self.request.attention
        slots = self._static_slots().view(1)["out_cache_loc"].long()
        if self.last is not None:
            attention.keys[self.last] *= 1.01
        self.last = slots.clone()


class Overtaken(TapeGraphRunner):
    """Tokens are loaded while the replay before still reads them, and are lost."""

    busy = False

    def __init__(self, request):
        super().__init__(request)
        wait = request.runtime.synchronize

        def synchronize():
            self.busy = False
            wait()

        vars(request.runtime)["synchronize"] = synchronize

    def replay(self, batch):
        if self.busy:
            kept = self._static_slots().view(batch.batch_size)["input_ids"]
            batch = replace(batch, input_ids=kept.clone())
        self.busy = True
        return super().replay(batch)


class StaleRerun(RerunGraphRunner):
    """Lengths of the first replay, where attention is not the kit's own."""

    first = None

    def replay(self, batch):
        if self.first is None:
            self.first = batch.seq_lens.clone(), batch.seq_lens_cpu.clone()
        size = min(batch.batch_size, len(self.first[0]))
        lens, host = batch.seq_lens.clone(), batch.seq_lens_cpu.clone()
        lens[:size], host[:size] = self.first[0][:size], self.first[1][:size]
        return super().replay(replace(batch, seq_lens=lens, seq_lens_cpu=host))


def stale_for_others(request):
    small = isinstance(request.attention, TinyAttention)
    return (TapeGraphRunner if small else StaleRerun)(request)


class NoRunner:
    def __new__(cls, request):
        return None


MUTANTS = {
    "stale_tokens": mutant(5, "input tokens of the first replay", graphs=stale("input_ids")),
    "stale_positions": mutant(5, "positions of the first replay", graphs=stale("positions")),
    "stale_rows": mutant(
        5, "request rows of the first replay", graphs=stale("req_pool_indices")
    ),
    "stale_lengths_in_graph": mutant(
        5, "lengths of the first replay", graphs=stale("seq_lens")
    ),
    "stale_host_lengths": mutant(
        5, "host lengths of the first replay", graphs=stale("seq_lens_cpu")
    ),
    "stale_slots": mutant(5, "slots of the first replay", graphs=stale("out_cache_loc")),
    "stale_tail": mutant(5, "padding keeps what earlier batches left", graphs=StaleTail),
    "padding_repeats_last_row": mutant(
        5, "padding is the last request again", graphs=PaddingRepeatsLastRow
    ),
    "weights_baked": mutant(
        5, "weights of the capture", graphs=WeightsBaked, only="L5/weights_in_place"
    ),
    "no_replay": mutant(5, "the output of the capture", graphs=NoReplay),
    "capture_raises": mutant(5, "a failing bucket ends the start", graphs=CaptureRaises),
    "capture_fails_silently": mutant(
        5, "a failing bucket leaves no record", graphs=CaptureFailsSilently
    ),
    "host_read_baked": mutant(5, "what was read on the host is recorded", graphs=HostReadBaked),
    "release_keeps_graphs": mutant(5, "release() gives nothing back", graphs=KeepsGraphs),
    "forgets_hidden_states": mutant(5, "hidden states are not kept", graphs=ForgetsHidden),
    "wrong_rows_of_output": mutant(5, "logits of the neighbour", graphs=WrongBucket),
    "outputs_overlap": mutant(5, "half of an output overwrites the other", graphs=SharedOutput),
    "wrong_fill_length": mutant(5, "padding has a length of its own", graphs=FillsWithZero),
    "overtaken": mutant(5, "a replay loses tokens to the next one", graphs=Overtaken),
    "stale_lengths_of_others": mutant(
        5,
        "lengths of the first replay, but not with the kit's attention",
        graphs=stale_for_others,
    ),
    "leaky_replay": mutant(5, "a replay disturbs the cache", graphs=LeakyReplay),
    "claims_graphs": mutant(
        5,
        "declares graphs and makes no runner",
        graphs=NoRunner,
        only="L5/replay_equals_eager",
    ),
}
