# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803 - constants that are functions are capitals
"""Gated activations: the activation of one half of the features times the other half.

An activation is computed in float32 and rounded to the dtype, then the product is rounded, as
torch's two operations do. Products of matrices take the activations themselves from here, for
their last step.

Shapes: E features out, 2·E in.
"""

from __future__ import annotations

__all__ = ["act_and_mul", "activate"]

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from bedplate.errors import ContractError
from bedplate.reference.ops import ACTIVATIONS
from bedplate_triton import configs
from bedplate_triton.sizes import cdiv, power_of_two

if TYPE_CHECKING:
    from torch import Tensor

    from bedplate_triton.features import Features

_LOG2E = tl.constexpr(1.4426950408889634)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_TWO_OVER_PI = tl.constexpr(0.7978845608028654)
_CUBIC = tl.constexpr(0.044715)
_MANY_ROWS = 4096
"""More rows choose no other sizes."""


def act_and_mul(x: Tensor, act: str, *, features: Features) -> Tensor:
    """See ``bedplate.reference.ops.act_and_mul``; one launch, nothing waits.

    Args:
        x: ``[…, 2·E]``, a float of at most 32 bits, the gate first. Read in place if features
            are adjacent and its leading dimensions are one run of equal steps; else copied.
        act: One of ``ACTIVATIONS``.
        features: The device.

    Returns:
        ``[…, E]`` in the dtype of ``x``, contiguous.

    Raises:
        ContractError: An unknown activation, or an odd number of features.
    """
    if act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ContractError(f"act_and_mul has no activation '{act}'; known: {known}")
    if x.shape[-1] % 2:
        raise ContractError(
            f"act_and_mul got {x.shape[-1]} features; half of them are the gate, so pass 2·E"
        )
    size = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    table = (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, 2 * size)
    rows = table.shape[0]
    class_of_rows = min(power_of_two(rows), _MANY_ROWS)
    config = configs.choose("gated", features, size=size, rows=class_of_rows)
    blocks = cdiv(size, config["columns"])
    _gate_rows[(rows * blocks,)](
        table, out, table.stride(0),
        size=size, act=act, blocks=blocks, block=config["columns"],
        num_warps=config["num_warps"], enable_fp_fusion=False, **features.chain.arguments(),
    )  # fmt: skip
    return out


@triton.jit
def activate(x, act: tl.constexpr):
    """The activation ``act`` of float32 numbers, in float32; not yet rounded to their dtype."""
    if act == "silu":
        out = x / (1.0 + tl.exp2(x * -_LOG2E))
    elif act == "gelu":
        out = 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif act == "gelu_tanh":
        bent = (x + x * x * x * _CUBIC) * _SQRT_TWO_OVER_PI
        out = 0.5 * x * (1.0 + _tanh(bent))
    else:
        tl.static_assert(act == "relu" or act == "relu2", "an activation without a kernel")
        out = tl.where(x < 0.0, 0.0, x)  # what is not a number stays so
        if act == "relu2":
            out *= out
    return out


@triton.jit
def _tanh(x):
    """By powers of two; near zero only so exact as a sum with 1 can tell."""
    fade = tl.exp2(tl.abs(x) * (-2.0 * _LOG2E))
    size = (1.0 - fade) / (1.0 + fade)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def _gate_rows(
    x, out, x_row,
    size: tl.constexpr, act: tl.constexpr, blocks: tl.constexpr, block: tl.constexpr,
    WAIT: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """Some columns of one row."""
    RELEASE()
    dtype: tl.constexpr = out.dtype.element_ty
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * block + tl.arange(0, block)
    inside = column < size
    gate = x + row * x_row + column
    WAIT()
    wide = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate + size, mask=inside, other=0.0).to(tl.float32)
    gated = activate(wide, act).to(dtype).to(tl.float32)
    tl.store(out + row * size + column, (gated * up).to(dtype), mask=inside)
