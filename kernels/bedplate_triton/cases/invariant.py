# SPDX-License-Identifier: Apache-2.0
"""Products with rows of fixed bits: odd sizes, and layers of a real model."""

from __future__ import annotations

__all__ = ["CASES"]

from functools import partial
from typing import TYPE_CHECKING

import torch

from bedplate_triton.cases import Case, Inputs
from bedplate_triton.invariant import invariant_linear

if TYPE_CHECKING:
    from torch import Tensor

    from bedplate_triton.features import Features


def _make(
    device: torch.device,
    seed: int,
    *,
    rows: int,
    n: int,
    size: int,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    gap: int = 0,
) -> Inputs:
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        return tensor if generator is None else tensor.normal_(0, scale, generator=generator)

    return {
        "x": draw(rows, size + gap)[:, :size],
        "weight": draw(n, size, scale=size**-0.5),
        "bias": draw(n) if bias else None,
    }


def _run(inputs: Inputs, features: Features) -> tuple[Tensor, ...]:
    return (invariant_linear(**inputs, features=features),)


def _reference(inputs: Inputs) -> tuple[Tensor, ...]:
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    wide = x.double() @ weight.double().T
    return ((wide if bias is None else wide + bias.double()).to(x.dtype),)


def _large(rows: int, n: int, size: int) -> Case:
    return Case(
        op="invariant_linear",
        name=f"{rows} rows, {n} x {size}",
        make=partial(_make, rows=rows, n=n, size=size),
        run=_run,
        reference=_reference,
        tolerance=5e-3,
        small=False,
        nbytes=2 * (n * size + rows * (size + n)),
        flops=2 * rows * n * size,
        target=0.5,
    )


def _small(name: str, tolerance: float, **facts: object) -> Case:
    return Case(
        op="invariant_linear", name=name, make=partial(_make, **facts), run=_run,  # type: ignore[arg-type]
        reference=_reference, tolerance=tolerance,
    )  # fmt: skip


CASES = (
    _small("odd sizes", 5e-3, rows=5, n=70, size=72),
    _small("several blocks, a bias", 5e-3, rows=70, n=130, size=192, bias=True),
    _small("rows that lie apart", 5e-3, rows=3, n=64, size=128, gap=16),
    _small("float32", 1e-5, rows=9, n=33, size=72, dtype=torch.float32),
    _small("float16", 2e-3, rows=9, n=33, size=72, dtype=torch.float16),
    _large(1, 6144, 4096),
    _large(32, 24576, 4096),
    _large(1024, 6144, 4096),
    _large(1024, 4096, 12288),
)
