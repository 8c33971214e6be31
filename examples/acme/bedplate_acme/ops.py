# SPDX-License-Identifier: Apache-2.0
"""Operations that torch has in one call; everything else stays the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

from bedplate.contract import OpProvider, OpRegistry, OpRequest, Support

if TYPE_CHECKING:
    from torch import Tensor

ORDERS = ("weight_after_cast", "weight_fp32", "no_weight")


def register(registry: OpRegistry) -> None:
    """Offer what this file has."""
    registry.register(
        OpProvider(op="rms_norm", provider="acme", call=rms_norm, supports=supports)
    )


def supports(request: OpRequest) -> Support:
    """Yes where the one call rounds as the model does."""
    order = request.attributes.get("order")
    return Support(order in ORDERS, f"no call of torch rounds as {order}")


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, order: str) -> Tensor:
    """``[..., E]`` normed over E; same bits as ``bedplate.reference.ops.rms_norm``."""
    if order == "weight_fp32":
        return functional.rms_norm(x, x.shape[-1:], weight, eps)
    normed = functional.rms_norm(x, x.shape[-1:], None, eps)
    return normed if weight is None else weight * normed
