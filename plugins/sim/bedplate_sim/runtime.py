# SPDX-License-Identifier: Apache-2.0
"""The simulated device as a DeviceRuntime, and what it is said to be able to do."""

from __future__ import annotations

__all__ = ["SimRuntime", "capabilities"]

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bedplate.contract import (
    ActivateRequest,
    BackendCapabilities,
    DeviceRuntime,
    GraphCapabilities,
    MemoryCapabilities,
    MemoryStatus,
)
from bedplate.errors import BackendUnavailableError
from bedplate_sim import operations, tensor
from bedplate_sim.device import Device
from bedplate_sim.options import read_options

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from bedplate_sim.device import Event


class SimRuntime(DeviceRuntime):
    """One simulated device, as one of the engines that share it has it.

    Attributes:
        simulated: The device: its streams, counters and faults, for tests.

    Raises:
        ConfigError: An option is wrong.
        BackendUnavailableError: Another engine of this process has the device with other
            options (HW010), or another extension has torch's room for one (HW011).
    """

    def __init__(self, request: ActivateRequest) -> None:
        options = read_options(request.options, request.environment)
        operations.install()
        index = request.device_index
        self._device = torch.device(tensor.DEVICE_TYPE, index)
        self.simulated = tensor.devices.get(index) or Device(self._device, options)
        if self.simulated.options != options:
            raise BackendUnavailableError(
                f"Another engine of this process has simulated device {index} with other "
                f"options. Close that one, ask for the same, or take sim:{index + 1}",
                code="HW010",
            )
        tensor.devices[index] = self.simulated
        self.simulated.holders[self] = False

    @property
    def device(self) -> torch.device:
        """Torch's device for outsiders, with the index."""
        return self._device

    def synchronize(self) -> None:
        """Wait for all queued work."""
        self.simulated.synchronize()

    def memory(self) -> MemoryStatus:
        """Of the simulated memory; what is cached is not free."""
        allocator = self.simulated.allocator
        return MemoryStatus(
            free_bytes=allocator.limit - allocator.reserved,
            total_bytes=allocator.limit,
            allocated_bytes=allocator.allocated,
        )

    def record_event(self) -> Event:
        """This point of the current stream."""
        return self.simulated.record_event()

    def empty_host(self, num_bytes: int) -> Tensor:
        """Pinned memory: copies that do not block read and write it when they run."""
        return self.simulated.new_pinned(num_bytes).as_subclass(tensor.PinnedTensor)

    def seed(self, seed: int) -> None:
        """Seed the generator, after all work that was queued before."""
        self.simulated.launch("seed", lambda: torch.manual_seed(seed))

    def empty_cache(self) -> None:
        """Give unused memory back to the device."""
        self.simulated.forbid_in_capture("empty_cache", "gives memory back")
        self.simulated.allocator.empty_cache()

    def inference_guard(self) -> AbstractContextManager[object]:
        """No autograd."""
        return torch.no_grad()

    def ready(self) -> None:
        """From now on operations that wait by themselves are refused, if that was asked for."""
        self.simulated.holders[self] = True

    def shutdown(self) -> None:
        """Give the device back; the last one drops work that nobody waited for."""
        held = self.simulated.holders.pop(self, None) is not None
        if held and not self.simulated.holders:
            self.simulated.close()
            del tensor.devices[self._device.index]


def capabilities(runtime: DeviceRuntime) -> BackendCapabilities:
    """What the options let the device be."""
    assert isinstance(runtime, SimRuntime)
    options = runtime.simulated.options
    dtypes = tuple(options.compute_dtypes.split("+"))
    return BackendCapabilities(
        device_type=tensor.DEVICE_TYPE,
        arch="sim",
        compute_dtypes=dtypes,
        kv_dtypes=dtypes,
        graph=GraphCapabilities(
            supported=options.graphs,
            default=options.graphs,
            stable_addresses=True,
            shared_pool=True,
            sampling_inside=options.graphs and options.sampling_inside,
        ),
        memory=MemoryCapabilities(
            asynchronous=options.asynchronous,
            pinned_host=True,
            page_sizes=tuple(int(size) for size in options.page_sizes.split("+")),
            index_dtype="int64" if options.index_dtype == "int64" else "int32",
        ),
        determinism="run_to_run",
        facts={
            "simulated": "yes: times mean nothing",
            "schedule": options.schedule,
            "memory": f"{options.memory >> 20} MiB",
        },
    )
