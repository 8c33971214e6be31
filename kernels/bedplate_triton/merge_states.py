# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803 - constants are capitals
"""Attention over two disjoint sets of keys, merged from the attention over each.

For prefixes that many requests share, and for prefixes walked in chunks: each set is attended
to by itself, and one launch joins the two results by the sums of their exponentials.

Shapes: T tokens, H heads, Dv value size.
"""

from __future__ import annotations

__all__ = ["merge_attention_states"]

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from bedplate.errors import ContractError
from bedplate_triton import configs
from bedplate_triton.decode_attention import LOG2E
from bedplate_triton.sizes import cdiv, power_of_two

if TYPE_CHECKING:
    from torch import Tensor

    from bedplate_triton.features import Features

_LN2 = tl.constexpr(0.6931471805599453)


def merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, features: Features
) -> tuple[Tensor, Tensor]:
    """See ``bedplate.reference.merge.merge_attention_states``; one launch, nothing waits.

    Args:
        out_a: ``[T, H, Dv]``, a float of at most 32 bits; last stride 1, others are free.
        lse_a: ``[T, H]`` float32, natural log; strides are free.
        out_b: As ``out_a``.
        lse_b: As ``lse_a``.
        features: The device.

    Returns:
        ``[T, H, Dv]`` in the dtype of ``out_a`` and ``[T, H]`` float32, new and contiguous.

    Raises:
        ContractError: Shapes or dtypes do not fit each other, or features are not adjacent.
    """
    _check(out_a, lse_a, out_b, lse_b)
    tokens, heads, size = out_a.shape
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=lse_a.dtype, device=out_a.device)
    if out.numel() == 0:
        return out, lse
    block = power_of_two(size)
    choice = configs.choose("merge_states", features, value_dim=size)
    tile = max(1, choice["elements"] // block)
    _merge_states[(cdiv(tokens * heads, tile),)](
        out_a, lse_a, out_b, lse_b, out, lse, tokens * heads,
        *out_a.stride()[:2], *out_b.stride()[:2], *lse_a.stride(), *lse_b.stride(),
        H=heads, DV=size, TILE=tile, BLOCK_V=block, num_warps=choice["num_warps"],
        **choice["options"], **features.chain.arguments(),
    )  # fmt: skip
    return out, lse


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    fits = out_a.shape == out_b.shape and lse_a.shape == lse_b.shape == out_a.shape[:2]
    if out_a.dim() != 3 or not fits:
        shapes = ", ".join(str(list(x.shape)) for x in (out_a, lse_a, out_b, lse_b))
        raise ContractError(
            f"merge_attention_states got {shapes}; pass [T, H, Dv] and [T, H], twice the same"
        )
    if (lse_a.dtype, lse_b.dtype, out_b.dtype) != (torch.float32, torch.float32, out_a.dtype):
        raise ContractError(
            f"merge_attention_states got outputs of {out_a.dtype} and {out_b.dtype}, sums of "
            f"{lse_a.dtype} and {lse_b.dtype}; outputs must agree, and sums are float32"
        )
    if out_a.stride(2) != 1 or out_b.stride(2) != 1:
        raise ContractError("outputs to merge must be adjacent in the last dimension")


# The number of rows follows the pass: specialised, it would compile while serving.
@triton.jit(do_not_specialize=["num_rows"])
def _merge_states(
    out_a, lse_a, out_b, lse_b, out, lse, num_rows,
    a_t, a_h, b_t, b_h, sum_a_t, sum_a_h, sum_b_t, sum_b_h,
    H: tl.constexpr, DV: tl.constexpr, TILE: tl.constexpr, BLOCK_V: tl.constexpr,
    WAIT: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """Merge ``TILE`` rows; row r is head r % H of token r // H."""
    RELEASE()
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = row < num_rows
    token = (row // H).to(tl.int64)
    head = row % H
    column = tl.arange(0, BLOCK_V)[None, :]
    inside = there[:, None] & (column < DV)
    WAIT()
    sum_a = tl.load(lse_a + token * sum_a_t + head * sum_a_h, mask=there, other=0.0)
    sum_b = tl.load(lse_b + token * sum_b_t + head * sum_b_h, mask=there, other=0.0)
    from_a = out_a + (token * a_t + head * a_h)[:, None] + column
    from_b = out_b + (token * b_t + head * b_h)[:, None] + column
    top = tl.maximum(sum_a, sum_b)
    finite = tl.where(top == float("-inf"), 0.0, top)
    weight_a = tl.exp2((sum_a - finite) * LOG2E)
    weight_b = tl.exp2((sum_b - finite) * LOG2E)
    total = weight_a + weight_b
    a = tl.load(from_a, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(from_b, mask=inside, other=0.0).to(tl.float32)
    # An empty side may hold NaN, and 0 · NaN would spread it.
    merged = tl.where((weight_a > 0)[:, None], a * weight_a[:, None], 0.0)
    merged += tl.where((weight_b > 0)[:, None], b * weight_b[:, None], 0.0)
    some = tl.where(total > 0, total, 1.0)
    merged = merged / some[:, None]
    where = out + row.to(tl.int64)[:, None] * DV + column
    tl.store(where, merged.to(out.dtype.element_ty), mask=inside)
    sums = tl.where(total > 0, finite + tl.log2(some) * _LN2, float("-inf"))
    tl.store(lse + row, sums, mask=there)
