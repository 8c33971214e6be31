# SPDX-License-Identifier: Apache-2.0
"""Flattened weight buckets: vector V20 and the traps of §5.6."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bedplate.errors import WeightsError
from bedplate.models.weight_bucket import flatten, reconstruct

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool,
          torch.float8_e4m3fn]  # fmt: skip


def v20():
    return [("a", torch.randn(2, 3)), ("b", torch.randn(4).half())]


def same(a, b):
    raw_a, raw_b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw_a, raw_b)


def test_mixed_dtypes_keep_their_bytes():
    """V20; a bucket of numbers promoted float16 to float32."""
    tensors = v20()
    bucket, entries = flatten(tensors)
    assert [(e.start, e.end) for e in entries] == [(0, 24), (24, 32)]
    assert (bucket.dtype, bucket.shape) == (torch.uint8, (32,))
    got = reconstruct(bucket, entries)
    assert list(got) == ["a", "b"]
    assert all(same(got[name], tensor) for name, tensor in tensors)


def test_wider_dtypes_are_aligned_and_gaps_are_zero():
    bucket, entries = flatten([("a", torch.ones(3, dtype=torch.int8)), ("b", torch.ones(1))])
    assert [(e.start, e.end) for e in entries] == [(0, 3), (4, 8)]
    assert bucket[3] == 0


def test_parts_are_views_of_the_bucket():
    bucket, entries = flatten(v20())
    reconstruct(bucket, entries)["a"].zero_()
    assert not bucket[:24].any()


def test_parameters_are_copied_without_their_graph():
    bucket, _ = flatten([("w", torch.nn.Parameter(torch.ones(2)))])
    assert not bucket.requires_grad


def test_an_empty_bucket_is_legal():
    bucket, entries = flatten([])
    assert (bucket.numel(), reconstruct(bucket, entries)) == (0, {})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"start": 2, "end": 26}, "a at 2–26 is misaligned for torch.float32"),
        ({"start": 16, "end": 40}, "a at 16–40 is out of range"),
        ({"start": -4, "end": 20}, "a at -4–20 is out of range"),
        ({"end": 20}, r"a at 0–20 does not hold \[2, 3\] torch.float32"),
        ({"name": "b"}, "b occurs twice"),
    ],
)
def test_false_entries_are_refused(changes, fault):
    """V20: misaligned offsets were read as they came."""
    bucket, (first, second) = flatten(v20())
    with pytest.raises(WeightsError, match=fault):
        reconstruct(bucket, [dataclasses.replace(first, **changes), second])


def test_every_fault_is_listed():
    bucket, entries = flatten(v20())
    broken = [dataclasses.replace(e, end=e.end + 100) for e in entries]
    with pytest.raises(WeightsError) as caught:
        reconstruct(bucket, broken)
    assert len(caught.value.facts["faults"]) == 4


def test_alignment_counts_from_the_storage():
    bucket, entries = flatten(v20())
    shifted = torch.zeros(33, dtype=torch.uint8)[1:]
    shifted.copy_(bucket)
    with pytest.raises(WeightsError, match="misaligned"):
        reconstruct(shifted, entries)


@pytest.mark.parametrize(
    "bucket",
    [
        torch.zeros(8),
        torch.zeros(2, 4, dtype=torch.uint8),
        torch.zeros(16, dtype=torch.uint8)[::2],
    ],
    ids=["dtype", "shape", "stride"],
)
def test_other_tensors_are_no_bucket(bucket):
    with pytest.raises(WeightsError, match="one contiguous row of uint8"):
        reconstruct(bucket, [])


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES), st.booleans()), max_size=8))
def test_round_trip_is_exact(specs):
    tensors = []
    for i, (shape, dtype, transposed) in enumerate(specs):
        tensor = (torch.randn(shape) * 3).to(dtype)
        tensors.append((str(i), tensor.transpose(0, -1) if transposed and shape else tensor))
    got = reconstruct(*flatten(tensors))
    assert all(same(got[name], tensor) for name, tensor in tensors)
