# SPDX-License-Identifier: Apache-2.0
"""Host memory that copies to the device are made from, without waiting for them."""

from __future__ import annotations

__all__ = ["BUFFERS", "HostBuffers"]

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from bedplate.contract.runtime import DeviceRuntime, Event

BUFFERS = 2
"""A step may be packed while the copy of the one before it is still under way."""


class HostBuffers:
    """Two buffers in turn; each is free again once the copy made from it has been done.

    Args:
        runtime: The device.
        capacity_bytes: Size of each; grows when more is asked for.

    Attributes:
        turn: Which of them was taken last.
    """

    def __init__(self, runtime: DeviceRuntime, capacity_bytes: int) -> None:
        self._runtime = runtime
        self._buffers = [runtime.empty_host(capacity_bytes) for _ in range(BUFFERS)]
        self._copied: list[Event | None] = [None] * BUFFERS
        self.turn = 0

    def take(self, num_bytes: int) -> Tensor:
        """``[num_bytes]`` uint8 of the next buffer; to be followed by a copy and ``sent``."""
        self.turn = (self.turn + 1) % BUFFERS
        pending = self._copied[self.turn]
        if pending is not None:
            pending.synchronize()
        if num_bytes > len(self._buffers[self.turn]):
            self._buffers[self.turn] = self._runtime.empty_host(2 * num_bytes)
        return self._buffers[self.turn][:num_bytes]

    def sent(self) -> None:
        """The copy from what was taken last has been queued."""
        self._copied[self.turn] = self._runtime.record_event()
