# SPDX-License-Identifier: Apache-2.0
"""From one decode step to the next without the host: the arithmetic of a recorded step.

A decode step differs from the one before it by one token a request.  So what a pass reads
lies at fixed places on the device and moves on there; the host sends only what does not
follow by itself: new members, and the first slot of a new page.

Shapes: B rows of the recorded pass, n of them real, U changes, R request rows, C tokens.
"""

from __future__ import annotations

__all__ = ["CHANGE_WIDTH", "HEADER_WIDTH", "DecodeRows", "advance_decode"]

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

HEADER_WIDTH = 4
"""Integers before the first change: real rows, changes, hold, and one that is not used."""
CHANGE_WIDTH = 4
"""Integers of a change: place in the batch, request row, length, slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRows:
    """What a recorded decode pass reads, at addresses that never move; device.

    Attributes:
        input_ids: ``[B]`` int64.
        positions: ``[B]`` int64.
        req_pool_indices: ``[B]`` int32.
        seq_lens: ``[B]`` int32.
        out_cache_loc: ``[B]`` int32 or int64.
    """

    input_ids: Tensor
    positions: Tensor
    req_pool_indices: Tensor
    seq_lens: Tensor
    out_cache_loc: Tensor


def advance_decode(
    changes: Tensor,
    rows: DecodeRows,
    req_to_token: Tensor,
    last_tokens: Tensor,
    fill_len: int,
) -> None:
    """Move every real row on by one token, then apply the changes; all in place.

    With ``hold`` nothing happens: the rows were loaded by somebody else.

    Length and slot of each of the first n rows grow by one.  A change replaces request row,
    length and slot of one place by absolute values.  Rows from n on become padding: request
    row 0, slot 0, length ``fill_len``, token and position 0.  The input token of a real row is
    the last one sampled for its request, its position is its length − 1, and its slot joins
    ``req_to_token`` there.

    Made of operations that can be recorded: nothing is read on the host.

    Args:
        changes: ``[HEADER_WIDTH + U·CHANGE_WIDTH or more]`` int32: n, U and hold (0 or 1),
            then the changes. n is at most B, and places are below n.
        rows: Moved on.
        req_to_token: ``[R, C]`` int32, gets the new slots.
        last_tokens: ``[R]`` int64, the token sampled last for each request row.
        fill_len: Length of padding rows.
    """
    count, num_changes, hold = changes[0], changes[1], changes[2] > 0
    place, row, length, slot = _entries(changes, num_changes, len(rows.seq_lens))
    real = torch.arange(len(rows.seq_lens), device=changes.device) < count
    owners = _changed(rows.req_pool_indices, place, row)
    lens = _changed(rows.seq_lens + 1, place, length)
    slots = _changed(rows.out_cache_loc + 1, place, slot)
    owners, slots = torch.where(real, owners, 0), torch.where(real, slots, 0)
    lens = torch.where(real, lens, fill_len)
    last, index = lens.long() - 1, owners.long()
    req_to_token[index, last] = torch.where(hold, req_to_token[index, last], slots.int())
    moved = DecodeRows(
        input_ids=torch.where(real, last_tokens[index], 0),
        positions=torch.where(real, last, 0),
        req_pool_indices=owners,
        seq_lens=lens,
        out_cache_loc=slots,
    )
    for field in fields(DecodeRows):
        target = getattr(rows, field.name)
        target.copy_(torch.where(hold, target, getattr(moved, field.name)))


def _entries(changes: Tensor, count: Tensor, size: int) -> tuple[Tensor, ...]:
    """Columns of all changes that there is room for; the place of an unused one is B."""
    room = (len(changes) - HEADER_WIDTH) // CHANGE_WIDTH
    stop = HEADER_WIDTH + room * CHANGE_WIDTH
    place, *values = changes[HEADER_WIDTH:stop].view(room, CHANGE_WIDTH).T
    live = torch.arange(room, device=changes.device) < count
    return torch.where(live, place, size).long(), *values


def _changed(values: Tensor, place: Tensor, changed: Tensor) -> Tensor:
    """``[B]`` values with some replaced; what is meant for place B is dropped."""
    longer = torch.cat((values, values.new_zeros(1)))
    longer[place] = changed.to(values.dtype)
    return longer[:-1]
