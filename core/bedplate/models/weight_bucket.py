# SPDX-License-Identifier: Apache-2.0
"""Many tensors in one flat run of bytes, so that a weight update is one transfer.

Bytes rather than numbers: tensors of different dtypes share a bucket without promotion, and
come back bit for bit.  The sender flattens; the receiver checks the entries, which came
over a wire, before it trusts them.
"""

from __future__ import annotations

__all__ = ["BucketEntry", "flatten", "reconstruct"]

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from bedplate.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketEntry:
    """Where one tensor lies.

    Attributes:
        name: Its name.
        shape: Its shape.
        dtype: Its dtype.
        start: First byte, a multiple of the dtype's size.
        end: One past its last byte.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    end: int


def flatten(named_tensors: Iterable[tuple[str, Tensor]]) -> tuple[Tensor, list[BucketEntry]]:
    """Copy tensors into one bucket, in order.

    Returns:
        ``[n]`` uint8 on the first tensor's device (the host if there is none), and the
        entries. Gaps, where a wider dtype needs its alignment, are zero.
    """
    tensors = list(named_tensors)
    entries: list[BucketEntry] = []
    end = 0
    for name, tensor in tensors:
        start = -(-end // tensor.itemsize) * tensor.itemsize
        end = start + tensor.nbytes
        shape = tuple(tensor.shape)
        entries.append(
            BucketEntry(name=name, shape=shape, dtype=tensor.dtype, start=start, end=end)
        )
    bucket = torch.zeros(
        end, dtype=torch.uint8, device=tensors[0][1].device if tensors else None
    )
    for entry, (_, tensor) in zip(entries, tensors, strict=True):
        _view(bucket, entry).copy_(tensor.detach())
    return bucket, entries


def reconstruct(bucket: Tensor, entries: Sequence[BucketEntry]) -> dict[str, Tensor]:
    """Name → tensor, as views of the bucket.

    Args:
        bucket: ``[n]`` uint8, contiguous.
        entries: As ``flatten`` made them.

    Raises:
        WeightsError: Lists every entry that is misaligned, out of range, of the wrong
            length or named twice.
    """
    if bucket.dtype != torch.uint8 or bucket.dim() != 1 or not bucket.is_contiguous():
        raise WeightsError(
            f"A weight bucket must be one contiguous row of uint8, not {list(bucket.shape)} "
            f"{bucket.dtype}. Send what weight_bucket.flatten returns"
        )
    faults = [fault for entry in entries for fault in _faults(bucket, entry)]
    names = [entry.name for entry in entries]
    faults += [
        f"{name} occurs twice" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if faults:
        raise WeightsError(
            f"The weight bucket of {bucket.numel()} bytes is malformed: {'; '.join(faults)}. "
            "Nothing was read; send bucket and entries from one call of weight_bucket.flatten",
            faults=tuple(faults),
        )
    return {entry.name: _view(bucket, entry) for entry in entries}


def _view(bucket: Tensor, entry: BucketEntry) -> Tensor:
    return bucket[entry.start : entry.end].view(entry.dtype).view(entry.shape)


def _faults(bucket: Tensor, entry: BucketEntry) -> list[str]:
    span = f"{entry.name} at {entry.start}–{entry.end}"
    faults = []
    if not 0 <= entry.start <= entry.end <= bucket.numel():
        faults.append(f"{span} is out of range")
    if (bucket.storage_offset() + entry.start) % entry.dtype.itemsize:
        faults.append(f"{span} is misaligned for {entry.dtype}")
    if entry.end - entry.start != prod(entry.shape) * entry.dtype.itemsize:
        faults.append(f"{span} does not hold {list(entry.shape)} {entry.dtype}")
    return faults
