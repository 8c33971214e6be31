# SPDX-License-Identifier: Apache-2.0
"""Norms: every rounding order, with and without a sum before."""

from __future__ import annotations

__all__ = ["CASES"]

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bedplate.reference import ops as reference
from bedplate.reference.ops import PartialProduct
from bedplate_triton import norm
from bedplate_triton.cases import Case, Inputs

if TYPE_CHECKING:
    from bedplate_triton.features import Features

_ROUNDING = 1e-2
"""bfloat16 where the order of a sum decides a last bit."""


def _make(
    device: torch.device,
    seed: int,
    *,
    shape: tuple[int, ...],
    order: str,
    residual: bool = True,
    affine: str = "weight",
    dtype: torch.dtype = torch.bfloat16,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        if device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    size = shape[-1]
    return {
        "x": 0.5 + draw(*shape, scale=2.0),
        "residual": draw(*shape) if residual else None,
        "weight": 1 + draw(size, scale=0.3) if "weight" in affine else None,
        "bias": draw(size) if "bias" in affine else None,
        "eps": 1e-6,
        "order": order,
    }


def _make_parts(device: torch.device, seed: int, *, splits: int, **facts: Any) -> Inputs:
    """What is normed, as parts of a product; their sum with the bias is much like it."""
    inputs = _make(device, seed, **facts)
    x = inputs["x"]
    parts = torch.stack([x.float() / splits] * splits)
    product = PartialProduct(parts=parts, bias=inputs["weight"], dtype=x.dtype)
    return inputs | {"x": product}


def _make_heads(
    device: torch.device,
    seed: int,
    *,
    tokens: int,
    order: str,
    dtype: torch.dtype = torch.bfloat16,
) -> Inputs:
    """Heads of keys as they lie in a packed projection."""
    shape = (tokens, 10 * 48)
    inputs = _make(device, seed, shape=shape, order=order, residual=False, dtype=dtype)
    heads = inputs["x"][:, 4 * 48 : 9 * 48].unflatten(-1, (5, 48))
    weight = None if order == "no_weight" else inputs["weight"][:48]
    return {"x": heads, "weight": weight, "eps": 1e-6, "order": order}


def _add_norm(inputs: Inputs, features: Features) -> tuple[Tensor, ...]:
    return norm.add_norm(**inputs, features=features)


def _rms_norm(inputs: Inputs, features: Features) -> tuple[Tensor, ...]:
    return (norm.rms_norm(**inputs, features=features),)


def _add_norm_reference(inputs: Inputs) -> tuple[Tensor, ...]:
    return reference.add_norm(**inputs)


def _rms_norm_reference(inputs: Inputs) -> tuple[Tensor, ...]:
    return (reference.rms_norm(**inputs),)


def _case(name: str, make: Any = _make, **facts: Any) -> Case:
    return Case(
        op="add_norm",
        name=name,
        make=partial(make, **facts),
        run=_add_norm,
        reference=_add_norm_reference,
        tolerance=_ROUNDING,
    )


def _heads_case(name: str, **facts: Any) -> Case:
    return Case(
        op="rms_norm",
        name=name,
        make=partial(_make_heads, **facts),
        run=_rms_norm,
        reference=_rms_norm_reference,
        tolerance=_ROUNDING,
    )


def _large(tokens: int, size: int, order: str = "weight_after_cast") -> Case:
    affine = "weight, bias" if order == "layer_norm" else "weight"
    return Case(
        op="add_norm",
        name=f"{order}, {tokens} tokens of {size}",
        make=partial(_make, shape=(tokens, size), order=order, affine=affine),
        run=_add_norm,
        reference=_add_norm_reference,
        tolerance=_ROUNDING,
        small=False,
        nbytes=4 * tokens * size * 2,
        target=0.9 if tokens >= 4096 else 0.0,
    )


CASES = (
    _heads_case("heads of a packed projection", tokens=7, order="weight_after_cast"),
    _heads_case("heads of one token, no weight", tokens=1, order="no_weight"),
    _case("rounds before the weight", shape=(3, 96), order="weight_after_cast"),
    _case("one plus the weight, two leading", shape=(2, 3, 64), order="one_plus_weight_fp32"),
    _case("weight in float32, one row", shape=(1, 1000), order="weight_fp32"),
    _case("no weight", shape=(5, 33), order="no_weight", affine=""),
    _case("nothing to add", shape=(3, 96), order="weight_fp32", residual=False),
    _case("a product in parts", _make_parts, splits=4, shape=(3, 96), order="weight_fp32"),
    _case(
        "parts alone",
        _make_parts,
        splits=2,
        shape=(2, 160),
        order="weight_fp32",
        residual=False,
    ),
    _case("layer norm", shape=(3, 300), order="layer_norm", affine="weight, bias"),
    _case("layer norm without a bias", shape=(9, 48), order="layer_norm"),
    _case("layer norm alone", shape=(1, 96), order="layer_norm", residual=False, affine=""),
    *(
        case
        for name, dtype in (("float32", torch.float32), ("float16", torch.float16))
        for case in (
            _case(name, shape=(3, 96), order="weight_fp32", dtype=dtype),
            _heads_case(f"heads in {name}", tokens=5, order="weight_after_cast", dtype=dtype),
        )
    ),
    *(_large(tokens, size) for tokens in (1, 8, 256, 4096) for size in (1024, 4096)),
    _large(4096, 4096, "layer_norm"),
)
