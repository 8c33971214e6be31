# SPDX-License-Identifier: Apache-2.0
"""From one decode step to the next without the host: the arithmetic of a recorded step.

A decode step differs from the one before it by one token a request.  So what a pass reads
lies at fixed places on the device and moves on there; the host sends only what does not
follow by itself: new members, and the first slot of a new page.

Shapes: B rows of the recorded pass, n of them real, U changes, R request rows, C tokens.
"""

from __future__ import annotations

__all__ = ["CHANGE_WIDTH", "HEADER_WIDTH", "DecodeRows", "advance_decode"]

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

HEADER_WIDTH = 4
"""Integers before the first change: real rows, changes, and two that are not used."""
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

    Length and slot of each of the first n rows grow by one.  A change replaces request row,
    length and slot of one place by absolute values.  Rows from n on become padding: request
    row 0, slot 0, length ``fill_len``, token and position 0.  The input token of a real row is
    the last one sampled for its request, its position is its length − 1, and its slot joins
    ``req_to_token`` there.

    Args:
        changes: ``[HEADER_WIDTH + U·CHANGE_WIDTH or more]`` int32: n and U, then the changes.
            n is at most B, and places are below n.
        rows: Moved on.
        req_to_token: ``[R, C]`` int32, gets the new slots.
        last_tokens: ``[R]`` int64, the token sampled last for each request row.
        fill_len: Length of padding rows.
    """
    count, num_changes = changes[:2].tolist()
    size = len(rows.seq_lens)
    rows.seq_lens[:count] += 1
    rows.out_cache_loc[:count] += 1
    stop = HEADER_WIDTH + num_changes * CHANGE_WIDTH
    place, row, length, slot = changes[HEADER_WIDTH:stop].view(-1, CHANGE_WIDTH).long().T
    rows.req_pool_indices[place] = row.int()
    rows.seq_lens[place] = length.int()
    rows.out_cache_loc[place] = slot.to(rows.out_cache_loc.dtype)
    real = torch.arange(size, device=changes.device) < count
    rows.req_pool_indices.masked_fill_(~real, 0)
    rows.seq_lens.masked_fill_(~real, fill_len)
    rows.out_cache_loc.masked_fill_(~real, 0)
    owners = rows.req_pool_indices.long()
    last = rows.seq_lens.long() - 1
    rows.positions.copy_(torch.where(real, last, 0))
    rows.input_ids.copy_(torch.where(real, last_tokens[owners], 0))
    req_to_token[owners[:count], last[:count]] = rows.out_cache_loc[:count].int()
