# SPDX-License-Identifier: Apache-2.0
"""One CUDA device as a DeviceRuntime, and what it can do.

Everything generic is inherited; here is taking the device and refusing it.
"""

from __future__ import annotations

__all__ = ["NARROW", "CudaRuntime", "capabilities"]

import ctypes

import torch

from bedplate.contract import (
    ActivateRequest,
    BackendCapabilities,
    DeviceRuntime,
    GraphCapabilities,
    MemoryCapabilities,
)
from bedplate.errors import BackendUnavailableError, ConfigError
from bedplate_cuda import driver
from bedplate_triton.runtime import TritonRuntime

_OLDEST = (8, 0)
_STACK_LIMIT = 0
"""Number of that limit in the driver's interface."""
_USUAL_STACK, _STACK = 1024, 256
"""Bytes of stack that the driver keeps for every thread the device can hold, and that we ask
for: a kernel whose needs the compiler knows gets them anyway, and ours are all such."""
_DTYPES = ("bfloat16", "float16", "float32")
NARROW = ("float8_e5m2", "float8_e4m3fn")
"""Torch dtypes of eight bits for the cache; the second from compute capability 8.9 on."""


class CudaRuntime(TritonRuntime):
    """The device ``request.device_index``, current in the thread that made the runtime.

    Raises:
        ConfigError: An option was given; there is none.
        BackendUnavailableError: The driver gives no device of that number (HW010), torch is
            of another build (HW011), or the device is older than sm_80 (HW012).
    """

    def __init__(self, request: ActivateRequest) -> None:
        if request.options:
            raise ConfigError(
                f"Backend 'cuda' has no option {', '.join(sorted(request.options))}; it has "
                "none. Remove it"
            )
        if torch.version.cuda is None:
            raise BackendUnavailableError(
                f"torch {torch.__version__} is built without CUDA. Install a CUDA build of it",
                code="HW011",
            )
        device = torch.device("cuda", request.device_index)
        self.capability = _take(device)
        super().__init__(device)
        _spare_stacks()


def capabilities(runtime: DeviceRuntime) -> BackendCapabilities:
    """What the device of an activated runtime can do."""
    properties = torch.cuda.get_device_properties(runtime.device)
    capability = (properties.major, properties.minor)
    return BackendCapabilities(
        device_type="cuda",
        arch=f"sm_{properties.major}{properties.minor}",
        compute_dtypes=_DTYPES,
        kv_dtypes=_DTYPES + NARROW[: 2 if capability >= (8, 9) else 1],
        graph=GraphCapabilities(
            supported=True,
            default=True,
            stable_addresses=True,
            shared_pool=True,
            sampling_inside=True,
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
            "toolkit": str(torch.version.cuda),
            "multiprocessors": str(properties.multi_processor_count),
            "communicator": "nccl",
        },
    )


def _take(device: torch.device) -> tuple[int, int]:
    """Make the device current and give its compute capability."""
    try:
        torch.cuda.set_device(device)
        capability = torch.cuda.get_device_capability(device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).partition("\n")[0].rstrip(".")
        raise BackendUnavailableError(
            f"{device} cannot be used: {cause}. See `nvidia-smi`, and whether the driver is as "
            f"new as CUDA {torch.version.cuda} of torch wants it",
            code="HW010",
        ) from error
    if capability < _OLDEST:
        major, minor = capability
        raise BackendUnavailableError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; the "
            "kernels need 8.0 or later. Choose another device with --backend cuda:INDEX, or "
            "--backend cpu",
            code="HW012",
        )
    return capability


def _spare_stacks() -> None:
    """Ask the driver for smaller stacks, 0.2 GB less on a device of 132 multiprocessors.

    Who asked for a size of their own keeps it; a driver that has no such limit keeps its way.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    size = ctypes.c_size_t()
    failed = cuda.cuCtxGetLimit(ctypes.byref(size), _STACK_LIMIT)
    if not failed and size.value == _USUAL_STACK:
        cuda.cuCtxSetLimit(_STACK_LIMIT, ctypes.c_size_t(_STACK))
