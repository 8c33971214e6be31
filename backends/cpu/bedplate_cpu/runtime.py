# SPDX-License-Identifier: Apache-2.0
"""The processor as a DeviceRuntime: threads bound to cores, memory of the host."""

from __future__ import annotations

__all__ = ["CpuRuntime", "capabilities"]

import os
from typing import Any

import psutil
import torch

from bedplate.contract import (
    ActivateRequest,
    BackendCapabilities,
    GraphCapabilities,
    MemoryCapabilities,
    MemoryStatus,
)
from bedplate.errors import ConfigError
from bedplate.reference.runtime import TorchRuntime
from bedplate_cpu import topology

_OPTIONS = {"threads"}


class CpuRuntime(TorchRuntime):
    """One process's share of the machine.

    Options: ``backend.cpu.threads`` = ``all`` (default), ``none``, or core lists; see
    ``topology.bind_cores``.
    """

    def __init__(self, request: ActivateRequest) -> None:
        super().__init__("cpu")
        self._previous = (torch.get_num_threads(), _affinity())
        self._world_size = request.world_size
        self.cores = topology.bind_cores(
            topology.read(),
            _setting(request),
            rank=request.rank,
            world_size=request.world_size,
        )
        if self.cores:
            torch.set_num_threads(len(self.cores))
        if self.cores and request.world_size > 1:
            _bind(set(self.cores))

    def memory(self) -> MemoryStatus:
        """Memory of the host, shared evenly between the ranks."""
        host = psutil.virtual_memory()
        return MemoryStatus(
            free_bytes=host.available // self._world_size,
            total_bytes=host.total // self._world_size,
        )

    def shutdown(self) -> None:
        """Give threads and affinity back as they were found."""
        threads, affinity = self._previous
        torch.set_num_threads(threads)
        if affinity is not None and affinity != _affinity():
            _bind(affinity)


def capabilities(host: topology.Host) -> BackendCapabilities:
    """What the processor can do; bfloat16 is preferred where it is native."""
    dtypes = ("bfloat16", "float32") if host.has_bf16_dot else ("float32", "bfloat16")
    return BackendCapabilities(
        device_type="cpu",
        arch=host.arch,
        compute_dtypes=(*dtypes, "float16"),
        kv_dtypes=("float32", "bfloat16", "float16"),
        graph=GraphCapabilities(
            supported=True,
            default=False,
            reason="compiling a bucket takes from seconds to minutes on a processor, more than "
            "a short run gains; ask for it with --graphs",
        ),
        memory=MemoryCapabilities(
            unified=True, page_sizes=(16, 1, 8, 32, 64, 128), index_dtype="int32"
        ),
        determinism="run_to_run",
        facts=host.facts(),
    )


def _setting(request: ActivateRequest) -> str:
    options: dict[str, Any] = dict(request.options)
    unknown = set(options) - _OPTIONS
    if unknown:
        raise ConfigError(
            f"Backend 'cpu' has no option {', '.join(sorted(unknown))}; it has: threads"
        )
    # Whoever set the number of threads for every library means it for us, too.
    default = "none" if "OMP_NUM_THREADS" in request.environment else "all"
    return str(options.get("threads", default))


def _affinity() -> set[int] | None:
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _bind(cores: set[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
