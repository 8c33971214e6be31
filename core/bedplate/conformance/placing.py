# SPDX-License-Identifier: Apache-2.0
"""Tensors between sentinels: whoever writes beside them, or into them unasked, is found.

A placed tensor lies in a buffer of its own, with guard bytes before and after it, and, where
its rows are spaced, between them: NaN for floats, so that reading there shows as well.
"""

from __future__ import annotations

__all__ = ["Guards", "leaves"]

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from bedplate.conformance.check import Wrong

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import Tensor

_GUARD_BYTES = 256
_PATTERN = 0xA5
_SPACING = 3
"""Elements between rows that are spaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """One buffer: its bytes when it was made, and which of them are the tensor's."""

    name: str
    raw: Tensor
    before: Tensor
    inside: Tensor


class Guards:
    """Places the arguments of one call.

    Args:
        device: Where.
        spaced: Names of arguments whose rows are set apart.
        shifted: Whether tensors begin one element off their alignment.
    """

    def __init__(
        self, device: torch.device, *, spaced: Collection[str] = (), shifted: bool = False
    ) -> None:
        self._device = device
        self._spaced = frozenset(spaced)
        self._shifted = shifted
        self._placed: list[_Placed] = []

    def place(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The same arguments with every tensor placed; records of tensors stay records."""
        return {name: self._move(name, value) for name, value in arguments.items()}

    def check(self, writes: Collection[str]) -> None:
        """Compare all bytes with those before.

        Args:
            writes: Names of arguments that the call may change.

        Raises:
            Wrong: Bytes outside of a tensor changed, or inside of one that is only read.
        """
        for placed in self._placed:
            changed = placed.raw.cpu() != placed.before
            if bool((changed & ~placed.inside).any()):
                raise Wrong(f"wrote beside '{placed.name}': its sentinels have changed")
            if bool(changed.any()) and not _covers(writes, placed.name):
                raise Wrong(f"changed '{placed.name}', which it may only read")

    def _move(self, name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._put(name, value)
        if is_dataclass(value) and not isinstance(value, type):
            moved = {
                f.name: self._move(f"{name}.{f.name}", getattr(value, f.name))
                for f in fields(value)
            }
            return replace(value, **moved)
        return value

    def _put(self, name: str, tensor: Tensor) -> Tensor:
        size = tensor.element_size()
        width = tensor.shape[-1] if tensor.ndim else 1
        gap = _SPACING if name in self._spaced and tensor.ndim > 1 else 0
        rows = tensor.numel() // width if width else 0
        start = _GUARD_BYTES + (size if self._shifted else 0)
        nbytes = rows * (width + gap) * size
        host = torch.full((start + nbytes + _GUARD_BYTES,), _PATTERN, dtype=torch.uint8)
        inside = torch.zeros(host.shape, dtype=torch.bool)
        body = host[start : start + nbytes]
        if nbytes:
            grid = body.view(tensor.dtype).view(rows, width + gap)
            if gap and tensor.is_floating_point():
                grid[:, width:] = float("nan")
            grid[:, :width] = tensor.reshape(rows, width)
            inside[start : start + nbytes].view(rows, -1)[:, : width * size] = True
        raw = host.to(self._device)
        raw = raw.clone() if raw.data_ptr() == host.data_ptr() else raw
        self._placed.append(_Placed(name=name, raw=raw, before=host, inside=inside))
        placed = raw[start : start + nbytes].view(tensor.dtype)
        if not tensor.ndim:
            return placed.view(())
        shape = (*tensor.shape[:-1], width + gap)
        return placed.view(shape)[..., :width]


def leaves(value: Any) -> Iterator[Tensor]:
    """Tensors of a result: itself, or those of a tuple or record."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from leaves(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from leaves(getattr(value, field.name))


def _covers(writes: Collection[str], name: str) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in writes)
