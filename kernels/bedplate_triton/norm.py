# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square norm in one kernel, in every rounding order of the reference.

Each step rounds as torch's own operations do on a device: the square, the sum, its product
with 1/E, and the rest are separate float32 steps that no fused multiply-add may join. Only
the order of the sum is this kernel's own; it depends on E alone, so a row has the same bits
in every batch. Offered through ``bedplate_triton.ops``.

Shapes: E features; a row is one E.
"""

from __future__ import annotations

__all__ = ["MAX_SIZE", "rms_norm"]

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from bedplate.errors import ContractError
from bedplate.reference.ops import RMS_NORM_ORDERS

if TYPE_CHECKING:
    from torch import Tensor

MAX_SIZE = 32768
"""Largest E: one program holds a whole row in registers."""

_SHORT_SIZE = 256
_SHORT_TILE = 1024
"""Elements of several short rows in one program: eight to a thread."""


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, order: str) -> Tensor:
    """See ``bedplate.reference.ops.rms_norm``; one launch, nothing waits.

    Args:
        x: ``[…, E]``, a float of at most 32 bits. Read in place if features are adjacent and
            its leading dimensions are at most two runs of equal steps; else copied first.
        weight: ``[E]``, any float, or ``None`` for the order ``no_weight``.
        eps: Added to the mean square.
        order: One of ``RMS_NORM_ORDERS``.

    Returns:
        ``[…, E]`` in the dtype of ``x``, new and contiguous.

    Raises:
        ContractError: An unknown order, a weight that does not fit it or ``x``, or E above
            ``MAX_SIZE``.
    """
    size = x.shape[-1]
    _check(size, weight, order)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    runs = _runs(x)
    if x.stride(-1) != 1 or len(runs) > 2:
        x = x.contiguous()
        runs = _runs(x)
    # Without a run its step is never taken; E has the alignment that other calls have.
    (outer, outer_step), (inner, inner_step) = [(1, size)] * (2 - len(runs)) + runs
    block = triton.next_power_of_2(size)
    tile = _SHORT_TILE // block if block <= _SHORT_SIZE else 1
    _norm_rows[(triton.cdiv(outer * inner, tile),)](
        x, None if weight is None else weight.contiguous(), out, eps,
        outer * inner, inner, outer_step, inner_step,
        order=order, size=size, inverse_size=1.0 / size, tile=tile, block=block,
        num_warps=min(max(block // 512, 4), 16), enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _check(size: int, weight: Tensor | None, order: str) -> None:
    if order not in RMS_NORM_ORDERS:
        known = ", ".join(RMS_NORM_ORDERS)
        raise ContractError(f"rms_norm has no rounding order '{order}'; known: {known}")
    if (weight is None) != (order == "no_weight"):
        given = "no weight" if weight is None else "a weight"
        raise ContractError(f"rms_norm got {given} with order '{order}'; pass what it names")
    if weight is not None and weight.shape != (size,):
        raise ContractError(
            f"rms_norm got a weight of {list(weight.shape)} for {size} features; pass [{size}]"
        )
    if size > MAX_SIZE:
        raise ContractError(
            f"rms_norm holds rows of at most {MAX_SIZE} features, not {size}; use the reference"
        )


def _runs(x: Tensor) -> list[tuple[int, int]]:
    """Leading dimensions as ``(rows, step)``, joined where one continues the other."""
    runs: list[tuple[int, int]] = []
    for rows, step in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if rows == 1:
            continue
        if runs and runs[-1][1] == rows * step:
            runs[-1] = (runs[-1][0] * rows, step)
        else:
            runs.append((rows, step))
    return runs


# Counts of rows change from step to step: specialised, they would compile while serving.
@triton.jit(do_not_specialize=["num_rows", "inner"])
def _norm_rows(
    x, weight, out, eps, num_rows, inner, outer_step, inner_step,
    order: tl.constexpr, size: tl.constexpr, inverse_size: tl.constexpr,
    tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Norm ``tile`` rows; row r starts at its two steps' multiples."""
    row = (tl.program_id(0) * tile + tl.arange(0, tile))[:, None]
    column = tl.arange(0, block)[None, :]
    fits = (row < num_rows) & (column < size)
    start = (row // inner).to(tl.int64) * outer_step + (row % inner).to(tl.int64) * inner_step
    wide = tl.load(x + start + column, mask=fits, other=0.0).to(tl.float32)
    mean = tl.sum(wide * wide, axis=1, keep_dims=True) * inverse_size
    result = wide * tl.rsqrt(mean + eps)
    if weight is not None:
        scale = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
        if order == "weight_after_cast":
            result = result.to(out.dtype.element_ty).to(tl.float32)
        if order == "one_plus_weight_fp32":
            scale += 1.0
        result *= scale
    target = out + row.to(tl.int64) * size + column
    tl.store(target, result.to(out.dtype.element_ty), mask=fits)
