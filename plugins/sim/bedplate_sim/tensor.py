# SPDX-License-Identifier: Apache-2.0
"""Tensors of the simulated device, and of the host memory that its copies use.

A ``SimTensor`` has shape and strides; behind it is memory that only queued work touches.  What
happens to it is in ``operations``.
"""

from __future__ import annotations

__all__ = ["DEVICE_TYPE", "PinnedTensor", "SimTensor", "devices", "plain", "tensors_in"]

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bedplate_sim.allocator import Allocation, Block
    from bedplate_sim.device import Device

DEVICE_TYPE = "privateuseone"
"""Torch's name of the device type; it stays unnamed, so that ``torch.accelerator`` and whoever
gives it a name are left alone."""

devices: dict[int, Device] = {}
"""Index → the device that engines have taken."""


class SimTensor(Tensor):
    """A tensor in device memory.

    Attributes:
        backing: The same tensor over the host memory that stands for the device's.
        memory: Held as long as any tensor lies in it.
    """

    backing: Tensor
    memory: Allocation

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, real: Tensor, memory: Allocation, device: torch.device) -> Self:
        """Wrap a tensor over device memory."""
        self: Self = Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(),
            dtype=real.dtype, device=device,
        )  # fmt: skip
        self._adopt(real, memory)
        return self

    def _adopt(self, real: Tensor, memory: Allocation) -> None:
        self.backing, self.memory = real, memory

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Queue one operation."""
        from bedplate_sim.operations import dispatch  # which makes tensors of this class

        return dispatch(func, args, kwargs or {})

    @property
    def block(self) -> Block:
        """The memory it lies in."""
        return self.memory.block

    @property
    def data(self) -> Tensor:
        """As of every tensor; assigning lets it lie elsewhere."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, SimTensor)
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self._adopt(value.backing, value.memory)

    def data_ptr(self) -> int:
        """Its address."""
        return self.backing.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """For its address and size; what it holds is the device's."""
        return self.backing.untyped_storage()

    def tolist(self) -> Any:
        """Wait for the device and read."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """As torch: a copy on the host has to be made first."""
        if force:
            return self.cpu().numpy()
        raise TypeError(f"can't convert a tensor of {self.device} to numpy; use .cpu() first")

    def __array__(self, *_args: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = self.detach().clone()
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"SimTensor({list(self.shape)}, {self.dtype}, {self.device}, {self.data_ptr():#x})"
        )


class PinnedTensor(Tensor):
    """Host memory that queued copies read and write; reading it is checked."""

    def is_pinned(self, device: object = None) -> bool:
        """Yes, whatever torch knows of it."""
        return True

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Views stay pinned; whoever looks inside must have waited."""
        kwargs, name = kwargs or {}, func.__name__
        with torch._C.DisableTorchFunctionSubclass():
            tensors = list(tensors_in((args, kwargs)))
            if name not in _KEEPS_OUT and not any(isinstance(t, SimTensor) for t in tensors):
                for tensor in tensors:
                    _check_look(tensor, name)
            result = func(*args, **kwargs)
            if type(result) is Tensor and _pinned(result) is not None:
                return result.as_subclass(cls)
        return result


_KEEPS_OUT = frozenset(
    ("__get__", "__getitem__", "__len__", "as_subclass", "data_ptr", "detach", "dim", "narrow",
     "numel", "size", "stride", "storage_offset", "to", "untyped_storage", "view")
)  # fmt: skip
"""Functions that see no values of their tensor."""


def _pinned(tensor: Tensor) -> tuple[Device, Block] | None:
    for device in devices.values():
        block = device.pinned(tensor)
        if block is not None:
            return device, block
    return None


def _check_look(tensor: Tensor, name: str) -> None:
    """Refuse the host what queued work still writes, and to write what it still reads."""
    found = _pinned(tensor)
    if found is not None:
        device, block = found
        write = name in ("numpy", "__setitem__") or name.endswith("_")
        device.touch_from_host(block, f"Tensor.{name} of pinned memory", write=write)


def plain(tensor: Tensor) -> Tensor:
    """A tensor of the host without the checks."""
    return tensor.as_subclass(Tensor) if isinstance(tensor, PinnedTensor) else tensor


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """All tensors of an argument, nested ones included."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for each in tree:
            yield from tensors_in(each)
    elif isinstance(tree, dict):
        yield from tensors_in(tuple(tree.values()))
