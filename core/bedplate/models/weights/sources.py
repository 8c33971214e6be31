# SPDX-License-Identifier: Apache-2.0
"""Where tensors come from: safetensors files, or tensors already at hand.

A source first says what it has (names, shapes, dtypes, from the headers alone), so that a
whole set can be checked before one byte is copied, and then reads one tensor at a time.
"""

from __future__ import annotations

__all__ = ["SafetensorsSource", "TensorInfo", "TensorSource", "WeightSource"]

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bedplate.errors import WeightsError

if TYPE_CHECKING:
    from pathlib import Path

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Dtype words of the safetensors header → torch dtypes; other words are refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """What a source says of one tensor.

    Attributes:
        name: Name in the checkpoint.
        shape: Sizes.
        dtype: As stored.
        origin: File name, or what the caller should recognise it by.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


class WeightSource(Protocol):
    """Named tensors, described before they are read."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name → shape, dtype and origin, in the order that is best to read."""

    def read(self, name: str) -> Tensor:
        """One tensor, wherever the source has it. Not to be written to."""


class SafetensorsSource:
    """Tensors of several safetensors files, mapped rather than loaded.

    Use as a context manager; the files stay open inside it.

    Raises:
        WeightsError: A header is damaged, a dtype is unknown, or two files hold one name.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._stack = ExitStack()
        self._handles: dict[str, Any] = {}
        self.infos: dict[str, TensorInfo] = {}
        with self._stack:
            for file in files:
                self._add(file)
            self._stack = self._stack.pop_all()

    def _add(self, file: Path) -> None:
        try:
            handle = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{file} is not a readable safetensors file ({error}); it has "
                f"{file.stat().st_size} bytes. Copy it again and compare sizes.",
                files=(file.name,),
            ) from error
        for name in handle.keys():  # noqa: SIM118 (a handle is not a mapping)
            if name in self.infos:
                raise WeightsError(
                    f"{name} is in both {self.infos[name].origin} and {file.name}. Keep one "
                    "copy of the checkpoint in the folder.",
                    files=(self.infos[name].origin, file.name),
                )
            self.infos[name] = _info(handle.get_slice(name), name, file.name)
            self._handles[name] = handle

    def read(self, name: str) -> Tensor:
        """The tensor on the host, a view of the mapped file: copy it before closing."""
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._handles.clear()
        self._stack.close()


class TensorSource:
    """Tensors that the caller already holds.

    Args:
        named_tensors: (name, tensor) pairs or a mapping; consumed at once.

    Raises:
        WeightsError: One name comes twice.
    """

    def __init__(
        self, named_tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]
    ) -> None:
        pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
        self._tensors: dict[str, Tensor] = {}
        for name, tensor in pairs:
            if name in self._tensors:
                raise WeightsError(f"{name} is given twice. Give each tensor once.")
            self._tensors[name] = tensor.detach()
        self.infos: dict[str, TensorInfo] = {
            name: TensorInfo(
                name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, origin="given tensors"
            )
            for name, tensor in self._tensors.items()
        }

    def detach_from(self, storages: Collection[int]) -> None:
        """Copy the tensors that live in one of these storages (addresses)."""
        for name, tensor in self._tensors.items():
            if tensor.untyped_storage().data_ptr() in storages:
                self._tensors[name] = tensor.clone()

    def read(self, name: str) -> Tensor:
        """The caller's tensor itself, or the copy."""
        return self._tensors[name]


def _info(piece: Any, name: str, origin: str) -> TensorInfo:
    word = piece.get_dtype()
    if word not in DTYPES:
        raise WeightsError(
            f"{name} in {origin} is stored as {word}, which is not supported; supported are "
            f"{', '.join(DTYPES)}.",
            files=(origin,),
        )
    return TensorInfo(
        name=name, shape=tuple(piece.get_shape()), dtype=DTYPES[word], origin=origin
    )
