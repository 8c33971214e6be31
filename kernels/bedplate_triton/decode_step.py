# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803 - constants are capitals
"""The step from one decode pass to the next, as the first launch of a recorded pass.

One program holds all rows, so that nothing but its own barrier stands between what the host
changed and what the rows of the pass become.  In the usual step nothing changed, and then no
row is read twice.

Shapes: B rows of the recorded pass, n of them real, U changes, R request rows, C tokens.
"""

from __future__ import annotations

__all__ = ["MAX_ROWS", "advance_decode"]

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from bedplate.errors import ContractError, UnsupportedError
from bedplate.reference import decode_step as reference
from bedplate_triton import configs
from bedplate_triton.sizes import power_of_two

if TYPE_CHECKING:
    from torch import Tensor

    from bedplate.reference.decode_step import DecodeRows
    from bedplate_triton.features import Features

MAX_ROWS = 1024
"""Largest B: one program holds all rows."""

HEADER = tl.constexpr(reference.HEADER_WIDTH)
CHANGE = tl.constexpr(reference.CHANGE_WIDTH)

_FEWEST_ROWS = 32
"""Smaller batches share the code of this one."""


def advance_decode(
    changes: Tensor,
    rows: DecodeRows,
    req_to_token: Tensor,
    last_tokens: Tensor,
    fill_len: int,
    *,
    features: Features,
) -> None:
    """See ``bedplate.reference.decode_step.advance_decode``; one launch, nothing waits.

    Args:
        changes: ``[4 + 4·U or more]`` int32: n, U, hold and one that is not used, then place,
            request row, length and slot of each change; U is at most B.
        rows: ``[B]`` each, contiguous; moved on in place.
        req_to_token: ``[R, C]`` int32, adjacent in the last dimension; gets the new slots.
        last_tokens: ``[R]`` int64.
        fill_len: Length of padding rows.
        features: The device.

    Raises:
        ContractError: The rows differ in number, or numbers are not adjacent.
        UnsupportedError: B is above ``MAX_ROWS``.
    """
    size = len(rows.seq_lens)
    _check(changes, rows, req_to_token, last_tokens)
    if size == 0:
        return
    _advance_kernel[(1,)](
        changes, rows.input_ids, rows.positions, rows.req_pool_indices, rows.seq_lens,
        rows.out_cache_loc, req_to_token, last_tokens,
        fill_len, size, req_to_token.stride(0),
        BLOCK=max(power_of_two(size), _FEWEST_ROWS),
        **configs.choose("decode_step", features, rows=power_of_two(size)),
        **features.chain.arguments(),
    )  # fmt: skip


def _check(
    changes: Tensor, rows: DecodeRows, req_to_token: Tensor, last_tokens: Tensor
) -> None:
    columns = (
        rows.input_ids, rows.positions, rows.req_pool_indices, rows.seq_lens,
        rows.out_cache_loc,
    )  # fmt: skip
    size = len(rows.seq_lens)
    if any(column.shape != (size,) for column in columns):
        shapes = [list(column.shape) for column in columns]
        raise ContractError(f"advance_decode got rows of {shapes}; pass one shape for all")
    flat = all(each.is_contiguous() for each in (changes, last_tokens, *columns))
    if not flat or req_to_token.stride(-1) != 1:
        raise ContractError("advance_decode takes numbers that are adjacent; pass no steps")
    if size > MAX_ROWS:
        raise UnsupportedError(
            f"advance_decode moves at most {MAX_ROWS} rows on in one program, not {size}; "
            "record smaller decode batches"
        )


# Whatever a batch decides is not specialised: it would compile while serving.
@triton.jit(
    do_not_specialize=["fill_len", "size"],
    do_not_specialize_on_alignment=["changes"],
)
def _advance_kernel(
    changes, input_ids, positions, owners, lengths, slots, table, last_tokens,
    fill_len, size, table_r,
    BLOCK: tl.constexpr, WAIT: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """Move all rows on; the order of the steps matters, see the comments."""
    RELEASE()
    WAIT()
    place = tl.arange(0, BLOCK)
    fits = place < size
    count = tl.load(changes)
    num_changes = tl.load(changes + 1)
    hold = tl.load(changes + 2)
    # Read before it is known whether there are changes, as that is the usual step.
    owner = tl.load(owners + place, mask=fits, other=0)
    length = tl.load(lengths + place, mask=fits, other=0)
    slot = tl.load(slots + place, mask=fits, other=0)
    if hold > 0:
        return
    if num_changes > 0:
        changed = place < num_changes
        change = changes + HEADER + place * CHANGE
        target = tl.load(change, mask=changed, other=0)
        # One less than what is wanted: they move on with all others below.
        old_length = tl.load(change + 2, mask=changed, other=0) - 1
        old_slot = tl.load(change + 3, mask=changed, other=0) - 1
        tl.store(owners + target, tl.load(change + 1, mask=changed, other=0), mask=changed)
        tl.store(lengths + target, old_length, mask=changed)
        tl.store(slots + target, old_slot.to(slots.dtype.element_ty), mask=changed)
        # What one thread wrote, another reads.
        tl.debug_barrier()
        owner = tl.load(owners + place, mask=fits, other=0)
        length = tl.load(lengths + place, mask=fits, other=0)
        slot = tl.load(slots + place, mask=fits, other=0)
    # Nobody overwrites what another has yet to read: several threads may hold the same row.
    tl.debug_barrier()
    real = place < count
    owner = tl.where(real, owner, 0)
    token = tl.load(last_tokens + owner, mask=real & fits, other=0)
    slot = tl.where(real, slot + 1, 0)
    tl.store(owners + place, owner, mask=fits)
    tl.store(lengths + place, tl.where(real, length + 1, fill_len), mask=fits)
    tl.store(slots + place, slot, mask=fits)
    tl.store(input_ids + place, token, mask=fits)
    tl.store(positions + place, tl.where(real, length, 0).to(tl.int64), mask=fits)
    entry = table + owner.to(tl.int64) * table_r + length
    tl.store(entry, slot.to(tl.int32), mask=real & fits)
