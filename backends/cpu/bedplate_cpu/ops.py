# SPDX-License-Identifier: Apache-2.0
"""Operations with a faster form on the host than their meaning in ``bedplate.reference``."""

from __future__ import annotations

__all__ = ["register", "rms_norm"]

from typing import TYPE_CHECKING

from torch.nn import functional

from bedplate.contract import OpProvider, OpRegistry, OpRequest, Support

if TYPE_CHECKING:
    from torch import Tensor

_ORDERS = ("weight_after_cast", "weight_fp32", "no_weight")


def register(registry: OpRegistry) -> None:
    """Offer what this file has."""
    registry.register(
        OpProvider(op="rms_norm", provider="cpu", call=rms_norm, supports=_supports)
    )


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, order: str) -> Tensor:
    """One fused call where the rounding order allows it; bit-equal to the reference.

    Args:
        x: ``[…, E]``.
        weight: ``[E]`` or ``None``.
        eps: Added to the mean square.
        order: One of ``_ORDERS``.

    Returns:
        ``[…, E]`` in the dtype of ``x``.
    """
    size = x.shape[-1:]
    if order == "weight_fp32":
        return functional.rms_norm(x, size, weight, eps)
    normed = functional.rms_norm(x, size, None, eps)
    return normed if weight is None else weight * normed


def _supports(request: OpRequest) -> Support:
    order = request.attributes.get("order")
    if order in _ORDERS:
        return Support.yes("one fused call")
    return Support.no(f"the fused call has no rounding order {order}")
