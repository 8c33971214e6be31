# SPDX-License-Identifier: Apache-2.0
"""The named operations that kernels of this package serve, for a backend to offer.

A backend calls ``register`` from its own hook, under its own name.
"""

from __future__ import annotations

__all__ = ["register"]

from bedplate.contract import OpProvider, OpRegistry, OpRequest, Support
from bedplate.reference.ops import RMS_NORM_ORDERS
from bedplate_triton.norm import MAX_SIZE, rms_norm

_DTYPES = ("bfloat16", "float16", "float32")


def register(registry: OpRegistry, provider: str) -> None:
    """Offer every operation that has a kernel.

    Args:
        registry: Where to.
        provider: Name of the backend that offers them.
    """
    registry.register(
        OpProvider(
            op="rms_norm",
            provider=provider,
            call=rms_norm,
            priority=100,
            supports=_supports_rms_norm,
            determinism="batch_invariant",
        )
    )


def _supports_rms_norm(request: OpRequest) -> Support:
    order, size = request.attributes.get("order"), request.attributes.get("size")
    if request.dtype not in _DTYPES:
        return Support.no(f"the kernel reads {', '.join(_DTYPES)}, not {request.dtype}")
    if order not in RMS_NORM_ORDERS:
        return Support.no(f"the kernel has no rounding order {order}")
    if not isinstance(size, int) or not 0 < size <= MAX_SIZE:
        return Support.no(f"the kernel holds rows of 1 to {MAX_SIZE} features, not {size}")
    return Support.yes(f"one kernel, order {order}")
