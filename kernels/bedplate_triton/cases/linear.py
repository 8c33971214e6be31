# SPDX-License-Identifier: Apache-2.0
"""Linear layers of few rows: odd sizes, every norm and activation, layers of real models."""

from __future__ import annotations

__all__ = ["CASES"]

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from bedplate.reference import ops as reference
from bedplate.reference.ops import ACTIVATIONS
from bedplate_triton.cases import Case, Inputs
from bedplate_triton.linear import linear, norm_linear

if TYPE_CHECKING:
    from torch import Tensor

    from bedplate_triton.features import Features

_TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3, torch.float32: 1e-5}
"""Where the order of a sum decides a last bit."""

_LAYERS = {
    "Qwen3-8B": {
        "qkv": (6144, 4096, "weight_after_cast", None),
        "o": (4096, 4096, None, None),
        "gate_up": (24576, 4096, "weight_after_cast", "silu"),
        "down": (4096, 12288, None, None),
        "head": (151936, 4096, None, None),
    },
    "Qwen3-0.6B": {
        "qkv": (4096, 1024, "weight_after_cast", None),
        "o": (1024, 2048, None, None),
        "gate_up": (6144, 1024, "weight_after_cast", "silu"),
        "down": (1024, 3072, None, None),
        "head": (151936, 1024, None, None),
    },
}
"""Name of a layer → N, E, order of the norm before it, activation after it."""
_MEASURED_ROWS = (1, 8, 16, 32)


def _make(
    device: torch.device,
    seed: int,
    *,
    rows: tuple[int, ...],
    n: int,
    size: int,
    bias: bool = False,
    padding: int = 0,
    order: str | None = None,
    residual: bool = True,
    act: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Inputs:
    """``padding`` features behind each row of input and weights are NaN."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, gap: int = 0) -> Tensor:
        wide = torch.empty((*shape[:-1], shape[-1] + gap), dtype=dtype, device=device).fill_(
            float("nan")
        )
        inner = wide[..., : shape[-1]]
        return inner if generator is None else inner.normal_(0.0, scale, generator=generator)

    inputs: Inputs = {
        "x": draw(*rows, size, gap=padding),
        "weight": draw(n, size, scale=size**-0.5, gap=padding),
        "bias": draw(n) if bias else None,
    }
    if order is None:
        return inputs
    return inputs | {
        "residual": draw(*rows, size) if residual else None,
        "norm_weight": None if order == "no_weight" else draw(size),
        "norm_bias": draw(size) if order == "layer_norm" else None,
        "eps": 1e-6,
        "order": order,
        "act": act,
    }


def _run(inputs: Inputs, features: Features) -> tuple[Tensor, ...]:
    if "order" in inputs:
        return norm_linear(**inputs, features=features)
    product = linear(**inputs, features=features)
    assert isinstance(product, torch.Tensor)  # nobody asked for parts
    return (product,)


def _reference(inputs: Inputs) -> tuple[Tensor, ...]:
    """Rounds where separate operations round, with sums of float64 inside a layer."""
    if "order" not in inputs:
        return (_wide_linear(**inputs),)
    norm = ("x", "residual", "norm_weight", "norm_bias", "eps", "order")
    normed, total = reference.add_norm(*(inputs[name] for name in norm))
    out = _wide_linear(normed, inputs["weight"], inputs["bias"])
    act = inputs["act"]
    return (out if act is None else reference.act_and_mul(out, act)), total


def _wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = reference.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    return wide.to(x.dtype)


def _case(name: str, *, small: bool = True, **facts: Any) -> Case:
    return Case(
        op="norm_linear" if "order" in facts else "linear",
        name=name,
        make=partial(_make, **facts),
        run=_run,
        reference=_reference,
        tolerance=_TOLERANCE[facts.get("dtype", torch.bfloat16)],
        small=small,
    )


def _large(model: str, layer: str, rows: int) -> Case:
    n, size, order, act = _LAYERS[model][layer]
    outputs = n if act is None else n // 2
    nbytes = 2 * (n * size + rows * (size + outputs))
    if order is not None:
        nbytes += 2 * (2 * rows * size + size)
    return Case(
        op="linear" if order is None else "norm_linear",
        name=f"{model}, {layer}, {rows} rows",
        make=partial(_make, rows=(rows,), n=n, size=size, order=order, act=act),
        run=_run,
        reference=_reference,
        tolerance=_TOLERANCE[torch.bfloat16],
        small=False,
        nbytes=nbytes,
        flops=2 * rows * n * size,
        target=0.88 if nbytes >= 50e6 else 0.75 if nbytes >= 30e6 else 0.5,
    )


CASES = (
    _case("one row", rows=(1,), n=21, size=72),
    _case("two rows, a bias", rows=(2,), n=14, size=96, bias=True),
    _case("three rows that lie apart", rows=(3, 1), n=7, size=72, padding=8),
    _case("four rows, several chunks", rows=(2, 2), n=5, size=1104),
    _case("four rows of float32", rows=(4,), n=7, size=200, bias=True, dtype=torch.float32),
    _case("five rows", rows=(5,), n=37, size=72, bias=True),
    _case("seventeen rows that lie apart", rows=(17,), n=70, size=272, padding=32),
    _case("five rows of float32", rows=(5,), n=37, size=72, dtype=torch.float32),
    *(
        _case(f"{rows} rows of float16", rows=(rows,), n=37, size=72, dtype=torch.float16)
        for rows in (2, 5)
    ),
    *(
        _case(f"norm in {name}", rows=(2,), n=6, size=72, order="weight_fp32", dtype=dtype)
        for name, dtype in (("float32", torch.float32), ("float16", torch.float16))
    ),
    _case("rounds before the weight", rows=(2,), n=6, size=1104, order="weight_after_cast"),
    _case("one more than the weight", rows=(1,), n=9, size=72, order="one_plus_weight_fp32"),
    _case("weight in float32", rows=(3,), n=6, size=72, order="weight_fp32", padding=8),
    _case(
        "no weight, nothing to add", rows=(1,), n=6, size=72, order="no_weight", residual=False
    ),
    _case("layer norm", rows=(2,), n=6, size=72, order="layer_norm", bias=True),
    *(
        _case(f"{act} after it", rows=(1,), n=14, size=72, order="weight_fp32", act=act)
        for act in ACTIVATIONS
    ),
    _case(
        "norm, bias, silu", rows=(4,), n=6, size=72, order="weight_fp32", act="silu", bias=True
    ),
    _case(
        "five rows, norm and silu", rows=(5,), n=74, size=72, order="weight_fp32", act="silu"
    ),
    _case(
        "eight rows of float32, features of a model",
        small=False,
        rows=(8,),
        n=1024,
        size=3072,
        dtype=torch.float32,
    ),
    *(
        _large(model, layer, rows)
        for model, layers in _LAYERS.items()
        for layer in layers
        for rows in _MEASURED_ROWS
    ),
)
