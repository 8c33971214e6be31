# SPDX-License-Identifier: Apache-2.0
"""What kernels may know of an AMD device, and the operations that it offers.

The kernels are neutral (``bedplate_triton``); here are the device's facts.  There are no
chained launches: graphs of HIP have no edges for them.
"""

from __future__ import annotations

__all__ = ["device_features", "features_of", "register"]

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from bedplate_rocm.architectures import ARCHITECTURES, arch_word
from bedplate_triton import ops
from bedplate_triton.features import Features

if TYPE_CHECKING:
    from bedplate.contract import OpRegistry


def features_of(arch: str, *, device: str = "", cores: int = 64) -> Features:
    """What kernels may know of a device.

    Args:
        arch: A key of ``ARCHITECTURES``.
        device: Its own name.
        cores: Compute units, or pairs of them where they work as one.
    """
    found = ARCHITECTURES[arch]
    return Features(
        arch=arch,
        device=device,
        family=found.family,
        cores=cores,
        slices=found.slices,
        wave=found.wave,
        shared_bytes=found.lds_bytes,
        early_registers=not found.direct_copies,
        narrow=found.narrow,
    )


def device_features() -> Features:
    """Facts of the current device; the same object on every call."""
    return _features(torch.cuda.current_device())


@lru_cache(maxsize=16)
def _features(index: int) -> Features:
    properties = torch.cuda.get_device_properties(index)
    return features_of(
        arch_word(properties.gcnArchName),
        device=properties.name,
        cores=properties.multi_processor_count,
    )


def register(registry: OpRegistry) -> None:
    """Offer every operation that has a kernel."""
    ops.register(registry, provider="rocm", features=device_features())
