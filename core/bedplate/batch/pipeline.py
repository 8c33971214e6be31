# SPDX-License-Identifier: Apache-2.0
"""PPProxyTensors: what one pipeline stage hands to the next.

A hand-written class rather than a dataclass, so that a compiler can trace its source.
Models create it, graph slots copy it, the stages send it.

Shapes: T new tokens, h hidden size.
"""

from __future__ import annotations

__all__ = ["PPProxyTensors"]

from typing import TYPE_CHECKING, overload

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class PPProxyTensors:
    """Named tensors ``[T, h]``, such as ``hidden_states`` and ``residual``.

    Args:
        tensors: Name → tensor; the mapping is copied, the tensors are shared.
    """

    __hash__ = None  # type: ignore[assignment]  # mutable, compared by value

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors: dict[str, Tensor] = dict(tensors)

    @overload
    def __getitem__(self, key: str) -> Tensor: ...
    @overload
    def __getitem__(self, key: slice) -> PPProxyTensors: ...
    def __getitem__(self, key: str | slice) -> Tensor | PPProxyTensors:
        """The tensor of that name, or every tensor's rows ``key`` as views.

        Raises:
            KeyError: No tensor of that name.
            TypeError: ``key`` is neither a name nor a slice.
        """
        if isinstance(key, str):
            return self.tensors[key]
        if isinstance(key, slice):
            return PPProxyTensors({name: rows[key] for name, rows in self.tensors.items()})
        raise TypeError(_key_fault(key, "a name or a slice of rows"))

    def __setitem__(self, key: str, tensor: Tensor) -> None:
        """Add or replace a tensor.

        Raises:
            TypeError: ``key`` is not a name.
        """
        if not isinstance(key, str):
            raise TypeError(_key_fault(key, "a name"))
        self.tensors[key] = tensor

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.tensors)

    def __eq__(self, other: object) -> bool:
        """Same names, shapes, dtypes, devices and values. Reads the device: for tests."""
        if not isinstance(other, PPProxyTensors):
            return NotImplemented
        return self.tensors.keys() == other.tensors.keys() and all(
            _same(tensor, other.tensors[name]) for name, tensor in self.tensors.items()
        )

    def __repr__(self) -> str:
        """Names, shapes and dtypes; no values, so that printing never waits."""
        parts = (f"{name}={list(t.shape)} {t.dtype}" for name, t in self.tensors.items())
        return f"PPProxyTensors({', '.join(parts)})"


def _same(a: Tensor, b: Tensor) -> bool:
    # torch.equal converts dtypes and refuses two devices, so both are compared before.
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _key_fault(key: object, wanted: str) -> str:
    return f"PPProxyTensors is indexed by {wanted}, not by {type(key).__name__} ({key!r})"
