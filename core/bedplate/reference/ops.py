# SPDX-License-Identifier: Apache-2.0
"""What each named operation means.

One short function per operation.  Rounding orders matter in bfloat16: they decide which of
two near-equal tokens wins, so they are part of the meaning.

Shapes: T tokens, E features in, N features out.
"""

from __future__ import annotations

__all__ = [
    "ACTIVATIONS",
    "NORM_ORDERS",
    "OPERATIONS",
    "RMS_NORM_ORDERS",
    "PartialProduct",
    "act_and_mul",
    "add_norm",
    "linear",
    "norm_linear",
    "rms_norm",
]

from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from bedplate.reference.decode_step import advance_decode
from bedplate.reference.rope import qk_norm_rope_write
from bedplate.reference.sampling import sample_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

RMS_NORM_ORDERS = ("weight_after_cast", "one_plus_weight_fp32", "weight_fp32", "no_weight")
"""How a norm rounds: the weight after the cast to the input's dtype; ``1 + weight`` in
float32; the weight in float32 before the cast; or no weight."""

NORM_ORDERS = (*RMS_NORM_ORDERS, "layer_norm")
"""Those of root-mean-square norms, and the norm that takes the mean away too."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": partial(functional.gelu, approximate="tanh"),
        "relu": functional.relu,
        "relu2": lambda x: functional.relu(x).square(),
    }
)
"""Name of every activation → its meaning; it rounds to the dtype of its input."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartialProduct:
    """A product whose summands are still apart, for a norm that adds them on its way.

    Attributes:
        parts: ``[S, …, N]`` float32, contiguous.
        bias: ``[N]`` or ``None``.
        dtype: That of the product.
    """

    parts: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """``[…, N]``."""
        return self.parts.shape[1:]

    def whole(self) -> Tensor:
        """``[…, N]``: the parts added in their order, then the bias, then rounded."""
        total = self.parts[0]
        for part in self.parts[1:]:
            total = total + part
        return (total if self.bias is None else total + self.bias.float()).to(self.dtype)


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


def add_norm(
    x: Tensor | PartialProduct,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    order: str,
) -> tuple[Tensor, Tensor]:
    """Add, round, and norm the sum.

    Args:
        x: ``[…, E]``, or a product still in parts.
        residual: The same, or ``None`` where nothing is added.
        weight: ``[E]``, or ``None``.
        bias: ``[E]`` for ``layer_norm``, or ``None``.
        eps: Added to the mean square, or to the variance.
        order: One of ``NORM_ORDERS``.

    Returns:
        The norm of the sum, and the sum in the dtype of ``x`` (``x`` itself without a
        residual).
    """
    if isinstance(x, PartialProduct):
        x = x.whole()
    total = x if residual is None else residual + x
    if order == "layer_norm":
        return functional.layer_norm(total, total.shape[-1:], weight, bias, eps), total
    return rms_norm(total, weight, eps, order), total


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    finish: bool = True,
) -> Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: ``[…, E]``.
        weight: ``[N, E]``.
        bias: ``[N]`` or ``None``.
        finish: False where ``add_norm`` or ``norm_linear`` comes next: a kernel may then leave
            the product in parts, as a ``PartialProduct``.

    Returns:
        ``[…, N]``.
    """
    return functional.linear(x, weight, bias)


def act_and_mul(x: Tensor, act: str) -> Tensor:
    """``[…, 2·E]`` → ``[…, E]``: the activation of the first half times the second."""
    gate, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[act](gate) * up


def norm_linear(
    x: Tensor | PartialProduct,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    order: str,
    weight: Tensor,
    bias: Tensor | None = None,
    act: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``add_norm``, then ``linear``, then with ``act`` also ``act_and_mul``.

    Args:
        x: As in ``add_norm``.
        residual: As in ``add_norm``.
        norm_weight: As ``weight`` in ``add_norm``.
        norm_bias: As ``bias`` in ``add_norm``.
        eps: As in ``add_norm``.
        order: One of ``NORM_ORDERS``.
        weight: ``[N, E]``; with ``act`` the rows of the gate come first.
        bias: ``[N]`` or ``None``.
        act: One of ``ACTIVATIONS``, or ``None``.

    Returns:
        ``[…, N]`` (``[…, N / 2]`` with ``act``), and the sum as ``add_norm`` gives it.
    """
    normed, total = add_norm(x, residual, norm_weight, norm_bias, eps, order)
    out = functional.linear(normed, weight, bias)
    return (out if act is None else act_and_mul(out, act)), total


OPERATIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "act_and_mul": act_and_mul,
        "add_norm": add_norm,
        "advance_decode": advance_decode,
        "linear": linear,
        "norm_linear": norm_linear,
        "qk_norm_rope_write": qk_norm_rope_write,
        "rms_norm": rms_norm,
        "sample_tokens": sample_tokens,
    }
)
"""Name of every operation → its meaning."""
