# SPDX-License-Identifier: Apache-2.0
"""What kernels may know of an NVIDIA device, and the operations that it offers.

The kernels are neutral (``bedplate_triton``); here are the device's facts and the functions
that only it has.
"""

from __future__ import annotations

__all__ = ["device_features", "register", "with_chain", "without_chain"]

from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
import triton
from triton.language.extra import cuda as extra

from bedplate_cuda.runtime import NARROW
from bedplate_triton import ops
from bedplate_triton.features import Chain, Features

if TYPE_CHECKING:
    from bedplate.contract import OpRegistry

_CHAINED_FROM = 90
"""Compute capability, as in the architecture word."""
_FED_BY_SHARED = (9, 10)
"""Major compute capabilities whose matrix units read operands from shared memory."""


@triton.jit
def _wait() -> None:
    """Until the kernels before have finished, and what they wrote can be seen."""
    extra.gdc_wait()


@triton.jit
def _release() -> None:
    """The next kernel may begin."""
    extra.gdc_launch_dependents()


@triton.jit
def _wait_and_release() -> None:
    """Both."""
    extra.gdc_wait()
    extra.gdc_launch_dependents()


_CHAIN = Chain(
    wait=_wait,
    release=_release,
    wait_and_release=_wait_and_release,
    options=MappingProxyType({"launch_pdl": True}),
)


def device_features() -> Features:
    """Facts of the current device; the same object on every call.

    Chained launches ("programmatic dependent launch") exist from compute capability 9.0 on.
    """
    return _features(torch.cuda.current_device())


def with_chain(features: Features) -> Features:
    """The same device with chained launches, if it has them."""
    capability = int(features.arch.removeprefix("sm_"))
    return replace(features, chain=_CHAIN if capability >= _CHAINED_FROM else Chain())


def without_chain(features: Features) -> Features:
    """The same device without chained launches; can be sent to another process."""
    return replace(features, chain=Chain())


@lru_cache(maxsize=16)
def _features(index: int) -> Features:
    properties = torch.cuda.get_device_properties(index)
    return with_chain(
        Features(
            arch=f"sm_{properties.major}{properties.minor}",
            device=properties.name,
            cores=properties.multi_processor_count,
            shared_bytes=int(getattr(properties, "shared_memory_per_block_optin", 48 << 10)),
            shared_operands=properties.major in _FED_BY_SHARED,
            narrow=NARROW[: 2 if (properties.major, properties.minor) >= (8, 9) else 1],
        )
    )


def register(registry: OpRegistry) -> None:
    """Offer every operation that has a kernel."""
    ops.register(registry, provider="cuda", features=device_features())
