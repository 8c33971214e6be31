# SPDX-License-Identifier: Apache-2.0
"""TorchRuntime: a DeviceRuntime over whatever torch knows of a device.

Complete for every device with a torch extension that registers a device module; a backend
overrides only what it knows better.
"""

from __future__ import annotations

__all__ = ["TorchRuntime"]

from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from bedplate.contract.runtime import DeviceRuntime, Event, MemoryStatus

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

_ALIGNMENT_BYTES = 64


class _Reached:
    """Event of a device whose calls have finished when they return."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always reached."""
        return True


class TorchRuntime(DeviceRuntime):
    """One torch device.

    Args:
        device: Device string with or without an index.
        pinned: Whether host staging memory is page-locked.
    """

    def __init__(self, device: str | torch.device, *, pinned: bool = False) -> None:
        self._device = torch.device(device)
        self._pinned = pinned
        self._module: Any = torch.get_device_module(self._device)

    @property
    def device(self) -> torch.device:
        """The torch device."""
        return self._device

    def synchronize(self) -> None:
        """Wait for all queued work of the device."""
        self._module.synchronize()

    def memory(self) -> MemoryStatus:
        """The device module's figures where it has them, else the host's."""
        if not hasattr(self._module, "mem_get_info"):
            host = psutil.virtual_memory()
            return MemoryStatus(free_bytes=host.available, total_bytes=host.total)
        free, total = self._module.mem_get_info(self._device)
        allocated = self._module.memory_allocated(self._device)
        return MemoryStatus(free_bytes=free, total_bytes=total, allocated_bytes=allocated)

    def record_event(self) -> Event:
        """An event of the current stream; already reached on a synchronous device."""
        if self._device.type == "cpu":
            return _Reached()
        event: Event = torch.Event(self._device)
        event.record()  # type: ignore[attr-defined]
        return event

    def empty_host(self, num_bytes: int) -> Tensor:
        """``[num_bytes]`` uint8, aligned to 64 bytes, page-locked if asked for."""
        raw = torch.empty(
            num_bytes + _ALIGNMENT_BYTES, dtype=torch.uint8, pin_memory=self._pinned
        )
        start = -raw.data_ptr() % _ALIGNMENT_BYTES
        return raw[start : start + num_bytes]

    def seed(self, seed: int) -> None:
        """Seed torch's generators."""
        torch.manual_seed(seed)

    def empty_cache(self) -> None:
        """Ask the device's caching allocator, if there is one."""
        release = getattr(self._module, "empty_cache", None)
        if release is not None:
            release()

    def inference_guard(self) -> AbstractContextManager[object]:
        """No autograd. Not ``inference_mode``: its tensors refuse later in-place updates."""
        return torch.no_grad()
