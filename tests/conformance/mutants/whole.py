# SPDX-License-Identifier: Apache-2.0
"""Mistakes that show in whole models, in counts and after faults."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from tests.conformance.mutants.attention import SharedCalls
from tests.conformance.mutants.base import mutant

from bedplate.memory.allocator import PagedAllocator
from bedplate_cpu.attention import NativeAttention
from bedplate_cpu.runtime import CpuRuntime

FIRST = "L6/family/llama"


class WrongAfter40(SharedCalls):
    """Long contexts forget their first token."""

    def _request(self, q, call, batch, request, sinks):
        if int(batch.seq_lens_cpu[request]) > 40:
            call = replace(call, window=39)
        return super()._request(q, call, batch, request, sinks)


class SecondLayerReadsFirst(NativeAttention):
    """All layers share the first one's cache."""

    def __init__(self, build):
        calls = tuple(replace(c, alias_of=0 if c.call_id else None) for c in build.calls)
        super().__init__(replace(build, calls=calls))


@torch.no_grad()
def spoil_one_weight(model):
    weight = next(p for n, p in model.named_parameters() if "down_proj" in n)
    weight[0] *= 1.5


@torch.no_grad()
def halve_weights(model):
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.copy_(weight.bfloat16().float())


class Waits(CpuRuntime):
    """Every pass waits for the device."""

    def inference_guard(self):
        self.synchronize()
        return super().inference_guard()


class WaitsTwice(Waits):
    def record_event(self):
        self.synchronize()
        return super().record_event()


class Slow(PagedAllocator):
    def alloc_decode(self, seq_lens, last_loc):
        time.sleep(0.002)
        return super().alloc_decode(seq_lens, last_loc)


def slow_norm(x, weight, eps, order):
    from bedplate.reference.ops import rms_norm

    time.sleep(0.005)
    return rms_norm(x, weight, eps, order)


class SwallowsFailures(CpuRuntime):
    """Fails to come back after it was shut down."""

    gone = False

    def __init__(self, request):
        if type(self).gone:
            raise RuntimeError("context was destroyed")
        super().__init__(request)

    def shutdown(self):
        type(self).gone = True
        super().shutdown()


def slow_graphs(request):
    from bedplate.testing.graphs import TapeGraphRunner

    class SlowReplay(TapeGraphRunner):
        def replay_graph(self, graph):
            time.sleep(0.02)
            super().replay_graph(graph)

    return SlowReplay(request)


def spoiled_pool(request):
    """A cache that forgets the last slot of every page, when there is more than one layer."""
    from bedplate.memory.kv_pool import LayeredKVPool

    class Forgetful(LayeredKVPool):
        def write(self, call_id, slots, k, v):
            if call_id:
                slots = torch.where(slots % self.page_size == self.page_size - 1, 0, slots)
            super().write(call_id, slots.to(torch.int32), k, v)

    return Forgetful(request)


MUTANTS = {
    "forgets_long_contexts": mutant(
        6, "beyond 40 tokens the first is not seen", attention=WrongAfter40, only=FIRST
    ),
    "layers_share_a_cache": mutant(
        6,
        "every layer reads the first one's cache",
        attention=SecondLayerReadsFirst,
        only=FIRST,
    ),
    "spoils_a_weight": mutant(
        6, "repacking changes one row of a weight", after_load=spoil_one_weight, only=FIRST
    ),
    "halves_weights": mutant(
        6, "float32 weights are rounded to bfloat16", after_load=halve_weights, only=FIRST
    ),
    "second_layer_forgets": mutant(
        6, "later layers lose the last slot of a page", pool=spoiled_pool, only=FIRST
    ),
    "waits_in_every_pass": mutant(
        7, "the device is waited for several times a step", runtime=WaitsTwice, only="L7/step/*"
    ),
    "slow_allocator": mutant(
        7, "milliseconds for a slot", allocator=lambda r: Slow(r.num_tokens, r.page_size)
    ),
    "slow_operation": mutant(
        7, "an operation that is slower than its meaning", ops={"rms_norm": slow_norm}
    ),
    "slow_replay": mutant(
        7, "a replay that is slower than the eager pass", graphs=slow_graphs, only="L7/replay"
    ),
    "does_not_come_back": mutant(
        8, "cannot be activated after a shutdown", runtime=SwallowsFailures
    ),
}
