# SPDX-License-Identifier: Apache-2.0
"""What the graph runners of one device share: a memory pool and the static input slots.

Sharing is legal because graphs of one device never replay at the same time.  State hangs on
the ``DeviceRuntime``, not on the module: two engines in one process stay apart, and it goes
when the runtime goes.
"""

from __future__ import annotations

__all__ = [
    "SlotBuffers",
    "get_global_graph_memory_pool",
    "set_global_graph_memory_pool",
    "shared_slot_buffers",
]

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bedplate.contract.runtime import DeviceRuntime

SlotBuffers: TypeAlias = MutableMapping[tuple[str, int, torch.dtype, torch.device], Tensor]
"""(name, number of elements, dtype, device) → flat buffer."""

_pools: WeakKeyDictionary[DeviceRuntime, Any] = WeakKeyDictionary()
_buffers: WeakKeyDictionary[DeviceRuntime, SlotBuffers] = WeakKeyDictionary()


def get_global_graph_memory_pool(runtime: DeviceRuntime) -> Any | None:
    """The pool handle that graphs of ``runtime`` share, or ``None`` before the first one."""
    return _pools.get(runtime)


def set_global_graph_memory_pool(runtime: DeviceRuntime, handle: Any) -> None:
    """Store the handle; its type is the backend's own business."""
    _pools[runtime] = handle


def shared_slot_buffers(runtime: DeviceRuntime) -> SlotBuffers:
    """Slot buffers of all runners of ``runtime``; each lives as long as a runner holds it."""
    buffers = _buffers.get(runtime)
    if buffers is None:
        buffers = _buffers[runtime] = WeakValueDictionary()
    return buffers
