# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803 - constants are capitals
"""A product whose rows have the same bits whatever else is multiplied with them.

Every output is one sum over the features, in their order, by the same instruction; nothing is
split, and no size depends on the number of rows, unless a configuration says that its classes
were found to agree on their device, bit for bit.  Slower than ``linear``; for those who need a
request to have the same answer in every batch.

Shapes: M rows, E features in, N features out.
"""

from __future__ import annotations

__all__ = ["invariant_linear", "invariant_norm_linear"]

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from bedplate.errors import ContractError
from bedplate_triton import configs
from bedplate_triton.features import neighbour
from bedplate_triton.gated import act_and_mul
from bedplate_triton.norm import add_norm
from bedplate_triton.sizes import cdiv

if TYPE_CHECKING:
    from torch import Tensor

    from bedplate.reference.ops import PartialProduct
    from bedplate_triton.features import Features

_GROUP = 8
"""Row blocks whose programs run side by side, so that they share weights in the cache."""
_WHOLE = 128
"""Features of which multiples need no mask, whatever the sizes of blocks."""


def invariant_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    finish: bool = True,
    *,
    features: Features,
) -> Tensor:
    """See ``bedplate.reference.ops.linear``; one launch, nothing waits.

    Args:
        x: ``[…, E]``.
        weight: ``[N, E]`` in the dtype of ``x``, adjacent features, any step from row to row.
        bias: ``[N]``, or ``None``.
        finish: Not asked: the result is always whole.
        features: The device.

    Returns:
        ``[…, N]``, new and contiguous.

    Raises:
        ContractError: The shapes or dtypes do not fit each other.
    """
    n, size = weight.shape
    if x.shape[-1] != size or x.dtype != weight.dtype or weight.stride(1) != 1:
        raise ContractError(
            f"a product of {list(x.shape)} in {x.dtype} with weights {list(weight.shape)} in "
            f"{weight.dtype} cannot be made; pass [N, E] of the same dtype, features adjacent"
        )
    rows = x.reshape(-1, size)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    count = rows.shape[0]
    out = x.new_empty((*x.shape[:-1], n))
    if not count:
        return out
    # Of the rows nothing is asked: their number must not choose the order of a sum.
    even = size % _WHOLE == 0
    config = configs.choose("invariant", features, n=n, bytes=x.element_size(), even=even)
    blocks = cdiv(count, config["BLOCK_M"]) * cdiv(n, config["BLOCK_N"])
    _multiply[(blocks,)](
        rows, weight, bias, out, count, n, rows.stride(0), weight.stride(0),
        E=size, GROUP=_GROUP, SLICES=features.slices, EVEN=size % config["BLOCK_K"] == 0,
        **config, **features.chain.arguments(),
    )  # fmt: skip
    return out


def invariant_norm_linear(
    x: Tensor | PartialProduct,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    order: str,
    weight: Tensor,
    bias: Tensor | None = None,
    act: str | None = None,
    *,
    features: Features,
) -> tuple[Tensor, Tensor]:
    """See ``bedplate.reference.ops.norm_linear``; its parts are invariant each by itself."""
    normed, total = add_norm(x, residual, norm_weight, norm_bias, eps, order, features=features)
    out = invariant_linear(normed, weight, bias, features=features)
    return (out if act is None else act_and_mul(out, act, features=features)), total


@triton.jit(do_not_specialize=["M", "x_row"])
def _multiply(
    x, weight, bias, out, M, N, x_row, w_row,
    E: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WAIT: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """One block of outputs; blocks of a few rows run side by side."""
    RELEASE()
    program = neighbour(tl.program_id(0), tl.num_programs(0), SLICES)
    across, down = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    row = (first + program % (GROUP * across) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = program % (GROUP * across) // height * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = tl.arange(0, BLOCK_K)
    # Rows and columns behind the end read others and are not written.
    x_at = x + (row % M).to(tl.int64)[:, None] * x_row + feature[None, :]
    w_at = weight + (column % N).to(tl.int64)[None, :] * w_row + feature[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    WAIT()
    for start in tl.range(0, E, BLOCK_K):
        if EVEN:
            a, b = tl.load(x_at + start), tl.load(w_at + start)
        else:
            inside = start + feature < E
            a = tl.load(x_at + start, mask=inside[None, :], other=0.0)
            b = tl.load(w_at + start, mask=inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + column % N).to(tl.float32)[None, :]
    target = out + row.to(tl.int64)[:, None] * N + column[None, :]
    written = (row < M)[:, None] & (column < N)[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=written)
