# SPDX-License-Identifier: Apache-2.0
"""What each named operation means.

One short function per operation.  Rounding orders matter in bfloat16: they decide which of
two near-equal tokens wins, so they are part of the meaning.

Shapes: T tokens, E features.
"""

from __future__ import annotations

__all__ = ["OPERATIONS", "RMS_NORM_ORDERS", "linear", "rms_norm"]

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

RMS_NORM_ORDERS = ("weight_after_cast", "one_plus_weight_fp32", "weight_fp32", "no_weight")
"""How a norm rounds: the weight after the cast to the input's dtype; ``1 + weight`` in
float32; the weight in float32 before the cast; or no weight."""


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, order: str) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32.

    Args:
        x: ``[…, E]``.
        weight: ``[E]``, or ``None`` for the order ``no_weight``.
        eps: Added to the mean square.
        order: One of ``RMS_NORM_ORDERS``.

    Returns:
        ``[…, E]`` in the dtype of ``x``, new storage.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if order == "weight_after_cast":
        return weight * normed.to(x.dtype)
    scale = weight.float() + 1.0 if order == "one_plus_weight_fp32" else weight.float()
    return (normed * scale).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; ``weight`` is ``[out, in]``."""
    return functional.linear(x, weight, bias)


OPERATIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"linear": linear, "rms_norm": rms_norm}
)
"""Name of every operation → its meaning."""
