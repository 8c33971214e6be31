# SPDX-License-Identifier: Apache-2.0
"""Merging attention states: empty sides, odd sizes, strides, and prompts of real models."""

from __future__ import annotations

__all__ = ["CASES"]

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bedplate.reference.merge import merge_attention_states as reference
from bedplate_triton.cases import Case, Inputs
from bedplate_triton.cases.decode_attention import draw
from bedplate_triton.merge_states import merge_attention_states

if TYPE_CHECKING:
    from bedplate_triton.features import Features

_TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
_NAMES = ("out_a", "lse_a", "out_b", "lse_b")


def _make(
    device: torch.device,
    seed: int,
    *,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    padding: int,
    empty: bool,
) -> Inputs:
    """States of rows wider by ``padding``; with ``empty`` either side, or both, lack keys."""
    tokens, heads, size = shape
    sides = []
    for side in range(2):
        out = draw(device, seed + side, (tokens, heads, size + padding), dtype)[..., :size]
        lse = 5 * draw(device, seed + 7 + side, (heads, tokens), torch.float32).T
        if empty:
            for rows in (slice(side, None, 3), slice(tokens - 1, tokens)):
                out[rows], lse[rows] = float("nan"), float("-inf")
        sides += [out, lse]
    return dict(zip(_NAMES, sides, strict=True))


def _run(inputs: Inputs, features: Features) -> tuple[Tensor, ...]:
    out, lse = merge_attention_states(**inputs, features=features)
    return out, _finite(lse)


def _reference(inputs: Inputs) -> tuple[Tensor, ...]:
    """In float32, rounded once."""
    wide = {name: value.float() for name, value in inputs.items()}
    out, lse = reference(**wide)
    return out.to(inputs["out_a"].dtype), _finite(lse)


def _finite(lse: Tensor) -> Tensor:
    """The same with −1e4 for −∞, which has no relative error."""
    return lse.clamp_min(-1e4)


def _case(
    name: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    padding: int = 0,
    empty: bool = True,
    small: bool = True,
) -> Case:
    tokens, heads, size = shape
    moved = 3 * tokens * heads * (size * dtype.itemsize + 4)
    return Case(
        op="merge_states",
        name=name,
        make=partial(_make, shape=shape, dtype=dtype, padding=padding, empty=empty),
        run=_run,
        reference=_reference,
        tolerance=_TOLERANCE[dtype],
        small=small,
        nbytes=0 if small else moved,
        target=0.0 if small or tokens < 1024 else 0.85,
    )


CASES = (
    _case("float32", (7, 3, 16), torch.float32),
    _case("float16", (7, 3, 16), torch.float16),
    _case("odd rows of a wider table", (5, 4, 40), torch.bfloat16, padding=24),
    _case("128", (9, 8, 128), torch.bfloat16),
    _case("64 tokens, 32 heads of 128", (64, 32, 128), torch.bfloat16, small=False),
    _case(
        "8192 tokens, 32 heads of 128",
        (8192, 32, 128),
        torch.bfloat16,
        empty=False,
        small=False,
    ),
)
