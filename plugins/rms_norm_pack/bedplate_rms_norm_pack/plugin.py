# SPDX-License-Identifier: Apache-2.0
"""Override ``rms_norm`` on every backend by torch's own function; the module is the plugin."""

from typing import Any

from bedplate.contract import (
    BackendManifest,
    OpProvider,
    OpRegistry,
    OpRequest,
    Support,
    hookimpl,
)


def rms_norm(x: Any, weight: Any, eps: float, order: str) -> Any:
    """As the reference; multiplies by the weight before it rounds to the dtype of ``x``."""
    from torch.nn.functional import rms_norm as fused

    return fused(x, x.shape[-1:], weight, eps)


def supports(request: OpRequest) -> Support:
    """Yes where rounding cannot differ from what the model asks for."""
    order, exact = request.attributes.get("order"), request.dtype == "float32"
    fits = order in ("weight_fp32", "no_weight") or (order == "weight_after_cast" and exact)
    return Support(fits, "" if fits else f"rounds otherwise than '{order}' in {request.dtype}")


@hookimpl
def bedplate_manifest() -> BackendManifest:
    """Identity."""
    return BackendManifest(name="rms_norm_pack", kind="kernels", summary="torch's rms_norm")


@hookimpl
def bedplate_register_ops(registry: OpRegistry) -> None:
    """One provider, above every backend's own."""
    offer: Any = {"op": "rms_norm", "provider": "rms_norm_pack", "kind": "kernels"}
    registry.register(OpProvider(**offer, call=rms_norm, priority=200, supports=supports))
