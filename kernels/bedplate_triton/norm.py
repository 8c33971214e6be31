# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803 - constants that are functions are capitals
"""Norms of rows in one kernel, in every rounding order of the reference, with a sum before.

Each step rounds as torch's own operations do on a device: the square, the sum, its product
with 1/E, and the rest are separate float32 steps that no fused multiply-add may join. Only
the order of the sum is this kernel's own; it depends on E alone, so a row has the same bits
in every batch. For the same reason the configurations know nothing of the number of rows.
Offered through ``bedplate_triton.ops``.

Shapes: E features; a row is one E.
"""

from __future__ import annotations

__all__ = ["MAX_SIZE", "add_norm", "rms_norm", "weigh"]

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from bedplate.errors import ContractError
from bedplate.reference.ops import NORM_ORDERS, RMS_NORM_ORDERS, PartialProduct
from bedplate_triton import configs
from bedplate_triton.sizes import cdiv, power_of_two

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bedplate_triton.features import Features

MAX_SIZE = 32768
"""Largest E: one program holds a whole row in registers."""


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, order: str, *, features: Features
) -> Tensor:
    """See ``bedplate.reference.ops.rms_norm``; one launch, nothing waits.

    Args:
        x: ``[…, E]``, a float of at most 32 bits. Read in place if features are adjacent and
            its leading dimensions are at most two runs of equal steps; else copied first.
        weight: ``[E]``, any float, or ``None`` for the order ``no_weight``.
        eps: Added to the mean square.
        order: One of ``RMS_NORM_ORDERS``.
        features: The device.

    Returns:
        ``[…, E]`` in the dtype of ``x``, new and contiguous.

    Raises:
        ContractError: An unknown order, a weight that does not fit it or ``x``, or E above
            ``MAX_SIZE``.
    """
    _check("rms_norm", RMS_NORM_ORDERS, x.shape[-1], weight, None, order)
    return _launch(x, None, weight, None, eps, order, features)[0]


def add_norm(
    x: Tensor | PartialProduct,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    order: str,
    *,
    features: Features,
) -> tuple[Tensor, Tensor]:
    """See ``bedplate.reference.ops.add_norm``; one launch, nothing waits.

    Args:
        x: ``[…, E]``, as in ``rms_norm``; or a product in parts, which are added on the way.
        residual: The same shape and dtype, copied first unless contiguous; or ``None``.
        weight: ``[E]``, any float; ``None`` for the order ``no_weight``, and allowed for
            ``layer_norm``.
        bias: ``[E]``, any float, or ``None``; for ``layer_norm`` only.
        eps: Added to the mean square, or to the variance.
        order: One of ``NORM_ORDERS``.
        features: The device.

    Returns:
        The norm of the sum, and the sum, both in the dtype of ``x``, new and contiguous.
        Without a residual the sum is ``x`` itself, and nothing is written for it; of parts it
        is always new.

    Raises:
        ContractError: As ``rms_norm``, or a residual or bias that does not fit.
    """
    _check("add_norm", NORM_ORDERS, x.shape[-1], weight, bias, order)
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ContractError(
            f"add_norm got a residual of {list(residual.shape)} {residual.dtype} for "
            f"{list(x.shape)} {x.dtype}; pass the same shape and dtype"
        )
    out, total = _launch(x, residual, weight, bias, eps, order, features)
    if total is None:
        assert isinstance(x, Tensor)  # what parts add up to is written
        total = x
    return out, total


def _launch(
    x: Tensor | PartialProduct,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    order: str,
    features: Features,
) -> tuple[Tensor, Tensor | None]:
    shape, dtype, size = x.shape, x.dtype, x.shape[-1]
    splits, x_bias = 0, None
    if isinstance(x, PartialProduct):
        splits, x_bias, x = x.parts.shape[0], x.bias, x.parts
    out = torch.empty(shape, dtype=dtype, device=x.device)
    total = None if residual is None and not splits else torch.empty_like(out)
    if out.numel() == 0:
        return out, total
    x, runs = (x, [(out.numel() // size, size)]) if splits else _runs(x)
    # Without a run its step is never taken; E has the alignment that other calls have.
    (outer, outer_step), (inner, inner_step) = [(1, size)] * (2 - len(runs)) + runs
    config = configs.choose("norm", features, size=size)
    tile = config["rows"]
    _norm_rows[(cdiv(outer * inner, tile),)](
        x, x_bias, _contiguous(residual), _contiguous(weight), _contiguous(bias), out, total,
        eps, outer * inner, inner, outer_step, inner_step,
        order=order, size=size, inverse_size=1.0 / size, splits=splits, tile=tile,
        block=power_of_two(size),
        num_warps=config["num_warps"], enable_fp_fusion=False,
        **features.chain.arguments(config["release"]),
    )  # fmt: skip
    return out, total


def _check(
    op: str,
    orders: Sequence[str],
    size: int,
    weight: Tensor | None,
    bias: Tensor | None,
    order: str,
) -> None:
    if order not in orders:
        raise ContractError(f"{op} has no rounding order '{order}'; known: {', '.join(orders)}")
    if order != "layer_norm":
        if (weight is None) != (order == "no_weight"):
            given = "no weight" if weight is None else "a weight"
            raise ContractError(f"{op} got {given} with order '{order}'; pass what it names")
        if bias is not None:
            raise ContractError(
                f"{op} got a bias with order '{order}'; only layer_norm has one"
            )
    for what, row in (("weight", weight), ("bias", bias)):
        if row is not None and row.shape != (size,):
            raise ContractError(
                f"{op} got a {what} of {list(row.shape)} for {size} features; pass [{size}]"
            )
    if size > MAX_SIZE:
        raise ContractError(
            f"{op} holds rows of at most {MAX_SIZE} features, not {size}; use the reference"
        )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _runs(x: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """Leading dimensions as ``(rows, step)``, joined where one continues the other.

    At most two, of ``x`` or of a copy, whose features are adjacent.
    """
    size = x.shape[-1]
    if x.is_contiguous():
        return x, [(x.numel() // size, size)]
    runs: list[tuple[int, int]] = []
    for rows, step in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if rows == 1:
            continue
        if runs and runs[-1][1] == rows * step:
            runs[-1] = (runs[-1][0] * rows, step)
        else:
            runs.append((rows, step))
    return _runs(x.contiguous()) if x.stride(-1) != 1 or len(runs) > 2 else (x, runs)


@triton.jit
def weigh(normed, scale, order: tl.constexpr, dtype: tl.constexpr):
    """Multiply normed numbers by a weight as ``order`` rounds; all float32, in and out.

    What comes out still has to be rounded to ``dtype``, that of the rows.
    """
    if order == "weight_after_cast":
        normed = normed.to(dtype).to(tl.float32)
    if order == "one_plus_weight_fp32":
        scale += 1.0
    return normed * scale


# Counts of rows change from step to step: specialised, they would compile while serving.
@triton.jit(do_not_specialize=["num_rows", "inner"])
def _norm_rows(
    x, x_bias, residual, weight, bias, out, total, eps, num_rows, inner, outer_step, inner_step,
    order: tl.constexpr, size: tl.constexpr, inverse_size: tl.constexpr, splits: tl.constexpr,
    tile: tl.constexpr, block: tl.constexpr, WAIT: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """Norm ``tile`` rows; row r of ``x`` starts at its two steps' multiples.

    With ``splits`` ``x`` is so many tables of float32, whose sum and ``x_bias`` it stands for.
    """
    RELEASE()
    dtype: tl.constexpr = out.dtype.element_ty
    row = (tl.program_id(0) * tile + tl.arange(0, tile))[:, None]
    column = tl.arange(0, block)[None, :]
    fits = (row < num_rows) & (column < size)
    if weight is not None:
        scale = tl.load(weight + column, mask=column < size, other=0.0)
    if bias is not None:
        shift = tl.load(bias + column, mask=column < size, other=0.0)
    start = (row // inner).to(tl.int64) * outer_step + (row % inner).to(tl.int64) * inner_step
    place = row.to(tl.int64) * size + column
    if x_bias is not None:
        x_shift = tl.load(x_bias + column, mask=column < size, other=0.0)
    WAIT()
    wide = tl.load(x + start + column, mask=fits, other=0.0).to(tl.float32)
    if splits > 0:
        for split in tl.static_range(1, splits):
            table = (split * num_rows).to(tl.int64) * size
            wide += tl.load(x + table + start + column, mask=fits, other=0.0)
        if x_bias is not None:
            wide += x_shift.to(tl.float32)
        wide = wide.to(dtype).to(tl.float32)
    if residual is not None:
        wide += tl.load(residual + place, mask=fits, other=0.0).to(tl.float32)
        wide = wide.to(dtype).to(tl.float32)
    if total is not None:
        tl.store(total + place, wide.to(dtype), mask=fits)
    if order == "layer_norm":
        wide -= tl.sum(wide, axis=1, keep_dims=True) * inverse_size
        wide = tl.where(column < size, wide, 0.0)
    mean = tl.sum(wide * wide, axis=1, keep_dims=True) * inverse_size
    result = wide * tl.rsqrt(mean + eps)
    if weight is not None:
        result = weigh(result, scale.to(tl.float32), order, dtype)
    if bias is not None:
        result += shift.to(tl.float32)
    tl.store(out + place, result.to(dtype), mask=fits)
