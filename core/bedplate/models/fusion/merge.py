# SPDX-License-Identifier: Apache-2.0
"""One matrix for several linears that read the same input.

The weights keep their names: each becomes a view of the merged matrix, so whatever updates
or saves them goes on as before.

Shapes: N features in, M features out of all members together.
"""

from __future__ import annotations

__all__ = ["MergedLinear", "merge_linears"]

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedLinear:
    """The merged matrix of some linears.

    Attributes:
        members: The linears, in the order of their rows.
        weight: ``[M, N]``.
        bias: ``[M]``, or ``None`` if no member has one.
        spans: First row and number of rows of each member.
    """

    members: tuple[Any, ...]
    weight: Tensor
    bias: Tensor | None
    spans: tuple[tuple[int, int], ...]

    def adopt(self) -> None:
        """Let the members' parameters, the same objects, live in the merged storage."""
        for member, span in zip(self.members, self.spans, strict=True):
            member.weight.data = self.weight.narrow(0, *span)
            if member.bias is not None and self.bias is not None:
                member.bias.data = self.bias.narrow(0, *span)


def merge_linears(members: Sequence[Any]) -> MergedLinear:
    """Merge linears of one input size, dtype and device.

    Those that lie one behind another in one storage already, as after an earlier merge, stay
    where they are; else their rows are copied into new storage, which ``adopt`` makes theirs.
    """
    sizes = [member.out_features for member in members]
    starts = itertools.accumulate(sizes, initial=0)
    biases = [member.bias for member in members]
    weight = _adjacent([member.weight for member in members])
    bias = None
    if any(each is not None for each in biases):
        like = members[0].weight
        filled = [
            like.new_zeros(size) if each is None else each.detach()
            for each, size in zip(biases, sizes, strict=True)
        ]
        bias = _adjacent(filled)
        bias = torch.cat(filled) if bias is None else bias
    if weight is None:
        weight = torch.cat([member.weight.detach() for member in members])
    return MergedLinear(
        members=tuple(members),
        weight=weight,
        bias=bias,
        spans=tuple(zip(starts, sizes, strict=False)),
    )


def _adjacent(parts: Sequence[Tensor]) -> Tensor | None:
    """All parts as one tensor, if they follow each other in one storage."""
    first = parts[0].detach()
    place = first.data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.data_ptr() == place):
            return None
        place += part.nbytes
    rows = sum(len(part) for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())
