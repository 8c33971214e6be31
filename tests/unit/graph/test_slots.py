# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bedplate.errors import ContractError
from bedplate.graph.buckets import pad_to
from bedplate.graph.slots import (
    PaddingPolicy,
    SlotKind,
    SlotRegistry,
    SlotSpec,
    decode_slots,
)

SIZES = (1, 2, 4, 8)
POISON = 99


def registry(*specs: SlotSpec, tokens: int = 1, shared: Any = None) -> SlotRegistry:
    return SlotRegistry(
        specs,
        sizes=SIZES,
        tokens_per_request=tokens,
        device=torch.device("cpu"),
        shared={} if shared is None else shared,
    )


def slot(policy: PaddingPolicy = PaddingPolicy.ZERO, **changes: Any) -> SlotSpec:
    spec = SlotSpec(name="x", kind=SlotKind.REQUEST, dtype=torch.int32, policy=policy)
    return dataclasses.replace(spec, **changes)


def ones(*shape: int) -> SimpleNamespace:
    return SimpleNamespace(x=torch.ones(shape, dtype=torch.int32))


@pytest.mark.parametrize(
    ("policy", "fill", "expected"),
    [
        (PaddingPolicy.ZERO, 0, [1, 1, 1, 0]),
        (PaddingPolicy.FILL_SENTINEL, 7, [1, 1, 1, 7]),
        (PaddingPolicy.KEEP_PAD, 7, [1, 1, 1, POISON]),
        (PaddingPolicy.FILL_ONCE, 7, [POISON] * 4),
    ],
)
def test_policy_decides_what_the_tail_holds(policy, fill, expected):
    slots = registry(slot(policy, fill=fill))
    slots.view(8)["x"].fill_(POISON)
    slots.load(ones(3), 3, 4)
    assert slots.view(4)["x"].tolist() == expected
    assert slots.view(8)["x"].tolist()[4:] == [POISON] * 4


def test_slots_start_as_padding():
    slots = registry(slot(PaddingPolicy.FILL_ONCE, fill=7))
    assert slots.view(8)["x"].tolist() == [7] * 8


def test_zero_policy_with_another_fill_is_refused():
    with pytest.raises(ContractError, match="FILL_SENTINEL"):
        slot(PaddingPolicy.ZERO, fill=1)


def test_token_slots_have_a_row_per_token_in_every_lead_row():
    """A three-row position slot sized by requests would lose tokens when K > 1."""
    spec = slot(kind=SlotKind.TOKEN, lead=(3,))
    slots = registry(spec, slot(name="y"), tokens=4)
    assert slots.view(2)["x"].shape == (3, 8)
    assert slots.view(2)["y"].shape == (2,)
    assert slots.view(8)["x"].shape == (3, 32)
    source = SimpleNamespace(x=torch.ones(3, 12, dtype=torch.int32), y=torch.ones(3))
    slots.view(8)["x"].fill_(POISON)
    slots.load(source, 3, 4)
    assert slots.view(4)["x"].tolist() == [[1] * 12 + [0] * 4] * 3


def test_narrower_source_leaves_padding_in_the_other_columns():
    slots = registry(slot(trail=(4,)))
    slots.view(8)["x"].fill_(POISON)
    slots.load(ones(3, 2), 3, 4)
    assert slots.view(4)["x"].tolist() == [[1, 1, 0, 0]] * 3 + [[0] * 4]
    slots.load(ones(4, 4), 4, 4)
    assert slots.view(4)["x"].tolist() == [[1] * 4] * 4


def test_padding_wider_than_the_gap_between_buckets():
    slots = registry(slot(PaddingPolicy.FILL_SENTINEL, fill=5))
    slots.view(8)["x"].fill_(POISON)
    slots.load(ones(1), 1, 8)
    assert slots.view(8)["x"].tolist() == [1] + [5] * 7


def test_source_of_another_dtype_is_converted():
    slots = registry(slot(dtype=torch.int64))
    slots.load(ones(2), 2, 2)
    assert slots.view(2)["x"].tolist() == [1, 1]


def test_views_are_made_once():
    slots = registry(slot())
    assert slots.view(4)["x"] is slots.view(4)["x"]
    assert slots.view(4)["x"].data_ptr() == slots.view(8)["x"].data_ptr()


def test_buffers_are_shared_by_name_size_dtype_and_device():
    shared: dict[Any, torch.Tensor] = {}
    first = registry(slot(), shared=shared)
    pointer = first.view(8)["x"].data_ptr()
    assert registry(slot(), shared=shared).view(8)["x"].data_ptr() == pointer
    others = [slot(name="y"), slot(dtype=torch.int64), slot(trail=(2,))]
    for other in others:
        view = registry(other, shared=shared).view(8)[other.name]
        assert view.data_ptr() != pointer
    assert first.num_bytes == 8 * 4


def test_host_slots_are_kept_apart_from_those_on_the_device():
    specs = decode_slots(seq_len_fill=1, index_dtype=torch.int32)
    assert [spec.name for spec in specs if spec.host] == ["seq_lens_cpu"]
    slots = SlotRegistry(
        specs,
        sizes=SIZES,
        tokens_per_request=1,
        device=torch.device("meta"),
        shared={},
    )
    views = slots.view(4)
    assert views["seq_lens"].device.type == "meta"
    assert views["seq_lens_cpu"].tolist() == [1] * 4


def test_decode_slots_match_the_vocabulary():
    specs = {
        spec.name: spec
        for spec in decode_slots(seq_len_fill=1, index_dtype=torch.int32, max_pages=5)
    }
    dtypes = {name: str(spec.dtype).removeprefix("torch.") for name, spec in specs.items()}
    assert dtypes == {
        "input_ids": "int64",
        "positions": "int64",
        "out_cache_loc": "int32",
        "req_pool_indices": "int32",
        "seq_lens": "int32",
        "seq_lens_cpu": "int32",
        "page_table": "int32",
    }
    tokens = {name for name, spec in specs.items() if spec.kind is SlotKind.TOKEN}
    assert tokens == {"input_ids", "positions", "out_cache_loc"}
    assert specs["page_table"].trail == (5,)
    assert all(spec.overwrites_padding for spec in specs.values())


@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    tokens=st.integers(1, 3),
    fill=st.integers(0, 2),
)
def test_nothing_of_an_earlier_batch_remains(sizes, tokens, fill):
    """Whatever was loaded before, a load leaves real rows and padding, nothing else."""
    specs = decode_slots(seq_len_fill=fill, index_dtype=torch.int64, max_pages=3)
    slots = registry(*specs, tokens=tokens)
    pads = {spec.name: spec.fill for spec in specs}
    for step, size in enumerate(sizes, start=3):
        bucket = pad_to(size, SIZES)
        assert bucket is not None
        values = {
            spec.name: torch.full(
                spec.shape(size * (tokens if spec.kind is SlotKind.TOKEN else 1)), step
            )
            for spec in specs
        }
        slots.load(SimpleNamespace(**values), size, bucket)
        for spec in specs:
            rows = len(values[spec.name])
            view = slots.view(bucket)[spec.name]
            assert (view[:rows] == step).all()
            assert (view[rows:] == pads[spec.name]).all()
