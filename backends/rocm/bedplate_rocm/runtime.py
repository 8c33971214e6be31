# SPDX-License-Identifier: Apache-2.0
"""One AMD device as a DeviceRuntime, and what it can do.

Torch built for ROCm calls its devices ``cuda`` and answers through ``torch.cuda``.
Everything generic is inherited; here is taking the device and refusing it.
"""

from __future__ import annotations

__all__ = ["HipRuntime", "capabilities"]

from typing import TYPE_CHECKING

import psutil
import torch

from bedplate.contract import (
    ActivateRequest,
    BackendCapabilities,
    DeviceRuntime,
    GraphCapabilities,
    MemoryCapabilities,
    MemoryStatus,
)
from bedplate.errors import BackendUnavailableError, ConfigError
from bedplate_rocm import driver, settings
from bedplate_rocm.architectures import ARCHITECTURES, arch_word, find
from bedplate_triton.runtime import TritonRuntime

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bedplate.contract import Decision

_DTYPES = ("bfloat16", "float16", "float32")
_EXPANDABLE = (
    "torch's allocator was told to use expandable segments, and on ROCm a capture that breaks "
    "off leaves those unusable; take them out of PYTORCH_HIP_ALLOC_CONF, or ask for graphs"
)


class HipRuntime(TritonRuntime):
    """The device ``request.device_index``, current in the thread that made the runtime.

    Attributes:
        arch: Architecture word, a key of ``ARCHITECTURES``.
        environment: Variables as they were when the device was taken.

    Raises:
        ConfigError: An option was given; there is none.
        BackendUnavailableError: Torch is of another build (HW011), the driver gives no device
            of that number (HW010), or no kernel is compiled for its architecture (HW012).
    """

    def __init__(self, request: ActivateRequest) -> None:
        if request.options:
            raise ConfigError(
                f"Backend 'rocm' has no option {', '.join(sorted(request.options))}; it has "
                "none. Remove it"
            )
        if torch.version.hip is None:
            raise BackendUnavailableError(
                f"torch {torch.__version__} is not built for ROCm. Install it by the command "
                "that pytorch.org shows under 'Get started' for your version of ROCm",
                code="HW011",
            )
        device = torch.device("cuda", request.device_index)
        self.arch = _take(device)
        self.environment: Mapping[str, str] = dict(request.environment)
        super().__init__(device)

    def decisions(self) -> Sequence[Decision]:
        """Of the kernels, and settings of the environment that are proposed."""
        return (*super().decisions(), *settings.decisions(self.environment))

    def memory(self) -> MemoryStatus:
        """What the device says; of memory shared with the host no more than is free there."""
        found = super().memory()
        if not _is_integrated(self.device):
            return found
        return MemoryStatus(
            free_bytes=min(found.free_bytes, psutil.virtual_memory().available),
            total_bytes=found.total_bytes,
            allocated_bytes=found.allocated_bytes,
        )


def capabilities(runtime: DeviceRuntime) -> BackendCapabilities:
    """What the device of an activated runtime can do."""
    assert isinstance(runtime, HipRuntime)
    properties = torch.cuda.get_device_properties(runtime.device)
    expandable = settings.has_expandable_segments(runtime.environment)
    return BackendCapabilities(
        device_type="cuda",
        arch=runtime.arch,
        compute_dtypes=_DTYPES,
        kv_dtypes=_DTYPES + ARCHITECTURES[runtime.arch].narrow,
        graph=GraphCapabilities(
            supported=True,
            default=not expandable,
            stable_addresses=True,
            shared_pool=True,
            sampling_inside=True,
            reason=_EXPANDABLE if expandable else "",
        ),
        memory=MemoryCapabilities(
            asynchronous=True,
            pinned_host=True,
            page_sizes=(16, 1, 32, 64),
            index_dtype="int32",
        ),
        determinism="batch_invariant",  # of what is chosen when it is asked for
        facts={
            "device": properties.name,
            "driver": driver.driver_version() or "unknown",
            "toolkit": str(torch.version.hip),
            "compute units": str(properties.multi_processor_count),
            "tested": "compiled for, not yet run on silicon; see docs/how-to/use-an-amd-gpu.md",
        },
    )


def _is_integrated(device: torch.device) -> bool:
    """Whether host and device share their memory."""
    return bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))


def _take(device: torch.device) -> str:
    """Make the device current and give its architecture word."""
    try:
        torch.cuda.set_device(device)
        properties = torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).partition("\n")[0].rstrip(".")
        raise BackendUnavailableError(
            f"{device} cannot be used: {cause}. See `rocminfo`, and whether the driver is as "
            f"new as ROCm {torch.version.hip} of torch wants it",
            code="HW010",
        ) from error
    arch = arch_word(properties.gcnArchName)
    if find(arch) is None:
        raise BackendUnavailableError(
            f"{properties.name} is {arch}, and kernels are compiled for "
            f"{', '.join(ARCHITECTURES)}. Choose another device with --backend rocm:INDEX, or "
            "--backend cpu; a close relative can pass for one of them with "
            "HSA_OVERRIDE_GFX_VERSION, at your own risk",
            code="HW012",
        )
    return arch
