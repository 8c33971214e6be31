# SPDX-License-Identifier: Apache-2.0
"""Gated activations: every activation, and the sizes of real models."""

from __future__ import annotations

__all__ = ["CASES"]

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bedplate.reference import ops as reference
from bedplate.reference.ops import ACTIVATIONS
from bedplate_triton.cases import Case, Inputs
from bedplate_triton.gated import act_and_mul

if TYPE_CHECKING:
    from bedplate_triton.features import Features

_ROUNDING = 2e-3
"""bfloat16 where the last bit of a float32 activation decides."""


def _make(
    device: torch.device,
    seed: int,
    *,
    shape: tuple[int, ...],
    act: str,
    padding: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Inputs:
    shape = (*shape[:-1], 2 * shape[-1] + padding)
    if device.type == "meta":
        x = torch.empty(shape, dtype=dtype, device=device)
    else:
        generator = torch.Generator().manual_seed(seed)
        x = (3 * torch.randn(shape, generator=generator)).to(device, dtype)
    return {"x": x[..., : shape[-1] - padding], "act": act}


def _run(inputs: Inputs, features: Features) -> tuple[Tensor, ...]:
    return (act_and_mul(**inputs, features=features),)


def _reference(inputs: Inputs) -> tuple[Tensor, ...]:
    return (reference.act_and_mul(**inputs),)


def _case(name: str, **facts: Any) -> Case:
    return Case(
        op="act_and_mul",
        name=name,
        make=partial(_make, **facts),
        run=_run,
        reference=_reference,
        tolerance=_ROUNDING,
    )


def _large(tokens: int, size: int, act: str) -> Case:
    return Case(
        op="act_and_mul",
        name=f"{act}, {tokens} tokens of {size}",
        make=partial(_make, shape=(tokens, size), act=act),
        run=_run,
        reference=_reference,
        tolerance=_ROUNDING,
        small=False,
        nbytes=3 * tokens * size * 2,
        target=0.9 if tokens >= 4096 else 0.0,
    )


CASES = (
    *(_case(act, shape=(3, 80), act=act) for act in ACTIVATIONS),
    _case("one odd row", shape=(1, 37), act="silu"),
    _case("rows of a wider table", shape=(5, 64), act="silu", padding=16),
    _case("two leading dimensions", shape=(2, 3, 16), act="gelu_tanh"),
    _case("several programs a row", shape=(5, 1100), act="relu2"),
    _case("float32", shape=(3, 80), act="gelu_tanh", dtype=torch.float32),
    _case("float16", shape=(3, 80), act="silu", dtype=torch.float16),
    *(
        _large(tokens, size, "silu")
        for tokens in (1, 8, 256, 4096)
        for size in (3072, 12288, 14336)
    ),
    _large(4096, 10240, "gelu_tanh"),
    _large(4096, 5120, "gelu"),
)
