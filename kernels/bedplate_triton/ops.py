# SPDX-License-Identifier: Apache-2.0
"""The named operations that kernels of this package serve, for a backend to offer.

A backend calls ``register`` from its own hook, under its own name and with the facts of its
device.
"""

from __future__ import annotations

__all__ = ["register"]

from functools import partial
from typing import TYPE_CHECKING, Any

from bedplate.contract import OpProvider, OpRegistry, OpRequest, Support
from bedplate.reference.ops import ACTIVATIONS, NORM_ORDERS
from bedplate_triton import linear
from bedplate_triton.decode_step import advance_decode
from bedplate_triton.gated import act_and_mul
from bedplate_triton.invariant import invariant_linear, invariant_norm_linear
from bedplate_triton.norm import MAX_SIZE, add_norm, rms_norm
from bedplate_triton.rope import qk_norm_rope_write
from bedplate_triton.sampling import sample_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from bedplate.contract.capabilities import DeterminismClass
    from bedplate_triton.features import Features

_DTYPES = ("bfloat16", "float16", "float32")


def register(registry: OpRegistry, provider: str, features: Features) -> None:
    """Offer every operation that has a kernel.

    Args:
        registry: Where to.
        provider: Name of the backend that offers them.
        features: The device.
    """

    def offer(
        op: str,
        call: Callable[..., Any],
        supports: Callable[[OpRequest], Support],
        determinism: DeterminismClass = "batch_invariant",
        name: str = provider,
        priority: int = 100,
    ) -> None:
        registry.register(
            OpProvider(
                op=op, provider=name, call=partial(call, features=features), priority=priority,
                supports=supports, determinism=determinism,
            )
        )  # fmt: skip

    offer("rms_norm", rms_norm, _supports_norm)
    offer("add_norm", add_norm, _supports_norm)
    offer("act_and_mul", act_and_mul, _supports_act)
    # Products take another form for another number of rows; slower ones do not.
    offer("linear", linear.linear, _supports_dtype, "run_to_run")
    offer("norm_linear", linear.norm_linear, _supports_act, "run_to_run")
    steady = f"{provider}, invariant"
    offer("linear", invariant_linear, _supports_dtype, name=steady, priority=50)
    offer("norm_linear", invariant_norm_linear, _supports_act, name=steady, priority=50)
    offer("qk_norm_rope_write", qk_norm_rope_write, _supports_heads)
    offer("sample_tokens", sample_tokens, _supports_dtype)
    offer("advance_decode", advance_decode, lambda _: Support.yes("one launch"))


def _supports_dtype(request: OpRequest) -> Support:
    if request.dtype not in _DTYPES:
        return Support.no(f"the kernel reads {', '.join(_DTYPES)}, not {request.dtype}")
    return Support.yes("one kernel")


def _supports_norm(request: OpRequest) -> Support:
    order, size = request.attributes.get("order"), request.attributes.get("size")
    if order not in NORM_ORDERS:
        return Support.no(f"the kernel has no rounding order {order}")
    if not isinstance(size, int) or not 0 < size <= MAX_SIZE:
        return Support.no(f"the kernel holds rows of 1 to {MAX_SIZE} features, not {size}")
    return _supports_dtype(request)


def _supports_act(request: OpRequest) -> Support:
    act = request.attributes.get("act")
    if act is not None and act not in ACTIVATIONS:
        return Support.no(f"the kernel has no activation {act}")
    return _supports_dtype(request)


def _supports_heads(request: OpRequest) -> Support:
    sizes = request.attributes
    columns = max(sizes.get("head_dim", 0), sizes.get("value_dim", 0))
    if sizes.get("flat"):
        columns *= sizes.get("heads", 1)
    most = _MOST_FLAT if sizes.get("flat") else _MOST_COLUMNS
    if columns > most:
        return Support.no(f"the kernel holds {most} numbers of a norm or head, not {columns}")
    return _supports_dtype(request)


_MOST_FLAT, _MOST_COLUMNS = 16384, 4096
"""Numbers of all heads of a token, and of one head."""
