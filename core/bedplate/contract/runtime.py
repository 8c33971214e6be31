# SPDX-License-Identifier: Apache-2.0
"""DeviceRuntime: the few things the core asks of a device.

``bedplate.reference.runtime.TorchRuntime`` is a complete implementation over
``torch.get_device_module``; a backend inherits from it and overrides what it knows better.
"""

from __future__ import annotations

__all__ = ["ActivateRequest", "DeviceRuntime", "Event", "MemoryStatus"]

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    import torch
    from torch import Tensor

    from bedplate.contract.decisions import Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivateRequest:
    """Asks a backend to take a device in this process.

    Attributes:
        device_index: Which of its devices.
        rank: This process's number among ``world_size``.
        world_size: Processes that serve one model together.
        options: The backend's own settings, ``backend.<name>.*`` of the configuration.
        environment: The process environment, read-only.
    """

    device_index: int = 0
    rank: int = 0
    world_size: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStatus:
    """Device memory now, in bytes.

    Attributes:
        free_bytes: What an allocation could still get.
        total_bytes: Size of the device's memory (or this process's share).
        allocated_bytes: Held by live tensors of this process.
    """

    free_bytes: int
    total_bytes: int
    allocated_bytes: int = 0


class Event(Protocol):
    """A point in the device's queue of work."""

    def synchronize(self) -> None:
        """Block the host until the point is reached."""

    def query(self) -> bool:
        """Whether the point has been reached."""


class DeviceRuntime(ABC):
    """One device, taken by one process.

    All methods are safe to call from the thread that activated the backend.
    """

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The torch device, with its index. Required."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done everything queued so far. Required."""

    @abstractmethod
    def memory(self) -> MemoryStatus:
        """Free, total and allocated bytes. Required."""

    @abstractmethod
    def record_event(self) -> Event:
        """Mark this point of the current stream. Required."""

    @abstractmethod
    def empty_host(self, num_bytes: int) -> Tensor:
        """A host uint8 tensor to stage copies from, page-locked where that helps. Required.

        Returns:
            ``[num_bytes]`` uint8 on the host, owned by the caller, aligned to 64 bytes.
        """

    @abstractmethod
    def seed(self, seed: int) -> None:
        """Seed the device's generator. Required."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Give cached, unused memory back to the device. Required; may do nothing."""

    @abstractmethod
    def inference_guard(self) -> AbstractContextManager[object]:
        """Context in which every forward runs (no autograd; threads or streams set)."""

    def rehearsal(self) -> AbstractContextManager[object] | None:
        """Context in which launches make kernels ready, all at once, instead of running them.

        Optional; ``None`` = kernels need no such time.  Whatever passes compute inside is
        thrown away.
        """
        return None

    def ready(self) -> None:  # noqa: B027 - optional, and doing nothing is right
        """Start-up is over: whatever takes long from now on, requests wait for. Optional."""

    def decisions(self) -> Sequence[Decision]:
        """What was chosen below the core during start-up, for ``explain``. Optional.

        Such as launch sizes that did not fit the device; asked once, when start-up is over.
        """
        return ()

    def shutdown(self) -> None:  # noqa: B027 - optional, and doing nothing is right
        """Give the device back. Optional; called once, also after a failed start."""
