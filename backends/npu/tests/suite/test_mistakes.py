# SPDX-License-Identifier: Apache-2.0
"""Mistakes that people make with this device, each seeded into the backend.

The backend's own checks are switched off for it: the device below has to notice, by an error
or by numbers that differ.  A mistake that passes means that the other tests prove nothing.
"""

from __future__ import annotations

import pytest
import torch
from backends.npu.tests.suite.scenario import LIMIT, Scenario

from bedplate.graph.slots import SlotRegistry
from bedplate_npu import attention, graph, ops
from bedplate_npu.attention import FusedInferAttention
from bedplate_npu.graph import NpuGraphRunner
from bedplate_npu.memory import NpuKVPool

pytestmark = pytest.mark.npu_silicon

CHECKS = ("_tensor_faults", "_length_faults", "_mask_faults", "_size_faults", "_store_faults")


def altered(**changes):
    """A mistake in the arguments of attention; a function gets the value that is right."""

    def seed(patch):
        real = ops.fused_infer_attention

        def wrong(query, key, value, **given):
            for name, change in changes.items():
                if given.get(name) is not None:
                    given[name] = change(given[name]) if callable(change) else change
            return real(query, key, value, **given)

        patch.setattr(attention.ops, "fused_infer_attention", wrong)

    return seed


def replaced(owner, name, make):
    """A mistake in a function: ``make`` gets the right one."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def no_check_of_records(patch):
    patch.setattr(graph, "_check_records", lambda *_: None)


def key_of_the_other_operator(patch):
    no_check_of_records(patch)
    patch.setattr(attention, "_length_key", lambda call: "actual_seq_kvlen")


def misspelt_key(patch):
    no_check_of_records(patch)
    patch.setattr(attention, "_length_key", lambda call: "actual_seq_lenghts_kv")


def stale_lengths(real):
    first = []

    def update_inputs(self, batch):
        first.append(real(self, batch))
        return first[0]

    return update_inputs


def off_by_one(real):
    return lambda self, batch: [
        {key: [length - 1 for length in lens] for key, lens in each.items()}
        for each in real(self, batch)
    ]


def one_update_too_few(real):
    return lambda self, batch: real(self, batch)[1:]


def no_fence(real):
    def replay_graph(self, made):
        real(self, made)
        self._fence = None

    return replay_graph


def slots_not_loaded(real):
    def load(self, source, count, bucket):
        slots = self.view(bucket)["out_cache_loc"]
        before = slots.clone()
        real(self, source, count, bucket)
        slots.copy_(before)

    return load


def padding_over_live_pages(real):
    def load(self, source, count, bucket):
        real(self, source, count, bucket)
        self.view(bucket)["out_cache_loc"][count:] = source.out_cache_loc[0] - 1

    return load


def page_of_16(patch):
    patch.setattr(ops, "PAGE_SIZE", 16)


def keys_and_values_swapped(real):
    return lambda self, call_id: real(self, call_id)[::-1]


def blocks_instead_of_pages(patch):
    def blocks(self, call_id):
        parts = self._parts(call_id)
        return tuple(part.view(-1, self.page_size, *part.shape[1:]) for part in parts)

    patch.setattr(NpuKVPool, "pages", blocks)


def default_cache_mode(patch):
    real = torch.ops.npu.npu_scatter_pa_kv_cache
    wrong = lambda *args, cache_mode: real(*args)  # noqa: E731
    patch.setattr(torch.ops.npu, "npu_scatter_pa_kv_cache", wrong, raising=False)


def window_counts_the_query(patch):
    altered(window=lambda window: window + 1)(patch)


def no_scale(patch):
    altered(scale=1.0)(patch)


def heads_as_key_heads(patch):
    altered(num_kv_heads=lambda heads: 2 * heads)(patch)


def not_cumulative(patch):
    altered(q_lens=lambda lens: [b - a for a, b in zip([0, *lens], lens, strict=False)])(patch)


def last_is_not_the_end(patch):
    altered(q_lens=lambda lens: [*lens[:-1], lens[-1] - 1])(patch)


def narrow_table(patch):
    altered(block_table=lambda table: table[:, :1].contiguous())(patch)


def strided_table(patch):
    altered(block_table=lambda table: table.repeat(1, 2)[:, ::2])(patch)


def wide_table(patch):
    altered(block_table=lambda table: table.long())(patch)


def no_mask(patch):
    def drop(mask):
        return None

    altered(mask=drop)(patch)


def small_mask(patch):
    altered(mask=lambda mask: mask[:128, :128].contiguous())(patch)


def mask_upside_down(patch):
    altered(mask=lambda mask: mask.T.contiguous() if mask.dim() == 2 else mask)(patch)


def left_up_causal(patch):
    altered(sparse_mode=lambda mode: 2 if mode == 3 else mode)(patch)


def swapped_layout(patch):
    altered(layout=lambda layout: "BSND" if layout == "BSH" else layout)(patch)


MISTAKES = {
    "no update": replaced(NpuGraphRunner, "update_host_parameters", lambda _: lambda *_: None),
    "stale lengths": replaced(FusedInferAttention, "update_inputs", stale_lengths),
    "lengths off by one": replaced(FusedInferAttention, "update_inputs", off_by_one),
    "one update too few": replaced(FusedInferAttention, "update_inputs", one_update_too_few),
    "key of the other operator": key_of_the_other_operator,
    "misspelt key": misspelt_key,
    "race with the replay before": replaced(NpuGraphRunner, "replay_graph", no_fence),
    "slots not refreshed": replaced(SlotRegistry, "load", slots_not_loaded),
    "padding over live pages": replaced(SlotRegistry, "load", padding_over_live_pages),
    "lengths not cumulative": not_cumulative,
    "last length is not T": last_is_not_the_end,
    "missing scale": no_scale,
    "wrong number of key heads": heads_as_key_heads,
    "pages of 16": page_of_16,
    "block table too narrow": narrow_table,
    "block table of int64": wide_table,
    "block table not contiguous": strided_table,
    "no mask": no_mask,
    "small mask": small_mask,
    "mask upside down": mask_upside_down,
    "causal from the left": left_up_causal,
    "window counts wrongly": window_counts_the_query,
    "wrong layout": swapped_layout,
    "keys and values swapped": replaced(NpuKVPool, "pages", keys_and_values_swapped),
    "cache of four dimensions": blocks_instead_of_pages,
    "default cache mode": default_cache_mode,
}
"""Name → how it is put into the backend."""


def reads_a_number(batch):
    batch.seq_lens.max().item()


def reads_lengths(batch):
    batch.seq_lens.tolist()


def copies_to_the_host(batch):
    batch.positions.cpu()


def waits(batch):
    torch.get_device_module("npu").synchronize()


INSIDE = {
    "item in a capture": reads_a_number,
    "lengths from the device in a capture": reads_lengths,
    "copy to the host in a capture": copies_to_the_host,
    "synchronisation in a capture": waits,
}


def caught(runtime, **options):
    """What was noticed; empty if nothing."""
    try:
        worst = Scenario(runtime, **options).worst()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if worst < LIMIT else f"results differ by {worst:.1e}"


@pytest.fixture
def unchecked(monkeypatch):
    for name in CHECKS:
        monkeypatch.setattr(ops, name, lambda *_args: ())
    return monkeypatch


def test_without_a_mistake_nothing_is_noticed(runtime, unchecked):
    assert caught(runtime) == ""


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_caught(runtime, unchecked, record_property, name):
    MISTAKES[name](unchecked)
    found = caught(runtime, pages=16 if name == "pages of 16" else 2)
    record_property("caught", found)
    assert found


@pytest.mark.parametrize("name", INSIDE)
def test_what_a_capture_forbids_is_caught(runtime, unchecked, record_property, name):
    def inside(batch):
        if capturing(runtime):
            INSIDE[name](batch)

    found = caught(runtime, inside=inside)
    record_property("caught", found)
    assert found


def capturing(runtime):
    """Whether the pass is the recorded one; warm-ups may wait."""
    calls = runtime.__dict__.setdefault("_passes", [])
    calls.append(1)
    return len(calls) % 3 == 0


def test_rebinding_instead_of_copying_is_caught(runtime, unchecked, record_property):
    found = caught(runtime, rebind=True)
    record_property("caught", found)
    assert found


def test_an_output_taken_for_another_is_caught(runtime, monkeypatch):
    x = torch.randn(3, 64).to(torch.float16)
    place, weight = runtime.device, torch.ones(64, dtype=torch.float16)
    real = torch.ops.npu.npu_add_rms_norm
    swapped = lambda *args, **kwargs: real(*args, **kwargs)[::-1]  # noqa: E731
    args = (x.to(place), x.to(place), weight.to(place), None, 1e-6, "weight_after_cast")
    total = ops.add_norm(*args)[1].cpu()
    monkeypatch.setattr(torch.ops.npu, "npu_add_rms_norm", swapped, raising=False)
    assert torch.equal(total, x + x)
    assert not torch.equal(ops.add_norm(*args)[0].cpu(), ops.add_norm(*args)[1].cpu())
