# SPDX-License-Identifier: Apache-2.0
"""KV storage and slots: what a backend may replace and what the core relies on.

Slot ``page · page_size + offset``.  Page 0 is never handed out: it swallows the writes of
padding rows.  Allocation runs on the host with integer arrays; storage is on the device.
"""

from __future__ import annotations

__all__ = [
    "AllocatorRequest",
    "AllocatorState",
    "HostKVCopy",
    "KVPool",
    "KVPoolRequest",
    "TokenToKVPoolAllocator",
]

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor

    from bedplate.contract.attention import AttentionCallSpec
    from bedplate.contract.runtime import DeviceRuntime

    Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPoolRequest:
    """What a KV pool is built from.

    Attributes:
        runtime: The activated device.
        calls: Every attention call that the model makes.
        num_tokens: Usable tokens, a multiple of ``page_size``; page 0 comes on top.
        page_size: Tokens a page.
        dtype: Storage dtype.
    """

    runtime: DeviceRuntime
    calls: tuple[AttentionCallSpec, ...]
    num_tokens: int
    page_size: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class HostKVCopy:
    """Keys and values of some slots on the host; see ``KVPool.get_cpu_copy``."""

    num_tokens: int
    tensors: tuple[Any, ...]


class KVPool(ABC):
    """Keys and values of every attention call, ``num_tokens + page_size`` slots each."""

    num_tokens: int
    page_size: int
    dtype: torch.dtype

    @abstractmethod
    def key(self, call_id: int) -> Tensor:
        """``[num_slots, K, D]``, the live storage (an alias's target). Required."""

    @abstractmethod
    def value(self, call_id: int) -> Tensor:
        """``[num_slots, K, Dv]``; a view of ``key`` for latent calls. Required."""

    @abstractmethod
    def write(self, call_id: int, slots: Tensor, k: Tensor, v: Tensor | None) -> None:
        """Store ``k[i], v[i]`` at ``slots[i]``, cast to the pool's dtype. Required.

        Args:
            call_id: The call; an alias writes nothing.
            slots: ``[T]`` device integers; slot 0 swallows padding.
            k: ``[T, K, D]``.
            v: ``[T, K, Dv]``, or ``None`` for latent calls.
        """

    @abstractmethod
    def move(self, target_slots: Tensor, source_slots: Tensor) -> None:
        """Copy slots to slots in every call; the two sets may overlap. Required."""

    @abstractmethod
    def get_cpu_copy(self, slots: Tensor) -> HostKVCopy:
        """Copy slots of every call to the host; the pool is unchanged. Required."""

    @abstractmethod
    def load_cpu_copy(self, copy: HostKVCopy, slots: Tensor) -> None:
        """Inverse of ``get_cpu_copy``; ``slots`` may be others, equally many. Required."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of device memory held. Required."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorRequest:
    """What an allocator is built from.

    Attributes:
        num_tokens: Usable tokens, a multiple of ``page_size``.
        page_size: Tokens a page.
        index_dtype: Integer type of slots on the device.
    """

    num_tokens: int
    page_size: int
    index_dtype: str = "int64"


@dataclass(frozen=True, slots=True)
class AllocatorState:
    """Opaque free list, made by ``backup_state``."""

    data: Any


class TokenToKVPoolAllocator(ABC):
    """Hands out slots on the host. All-or-nothing: ``None`` leaves the state unchanged.

    All arrays are host int32; sequence arguments are 1-D arrays of equal length.
    """

    page_size: int

    @abstractmethod
    def available_size(self) -> int:
        """Tokens that could be allocated now. Required."""

    @abstractmethod
    def alloc(self, num_tokens: int) -> Int32Array | None:
        """Slots of whole free pages; ``num_tokens`` must be a multiple of the page size."""

    @abstractmethod
    def alloc_extend(
        self, prefix_lens: Int32Array, seq_lens: Int32Array, last_loc: Int32Array
    ) -> Int32Array | None:
        """Slots for the tokens ``prefix_lens[i] … seq_lens[i]`` of each request, packed.

        Args:
            prefix_lens: Tokens that already have slots.
            seq_lens: Length afterwards.
            last_loc: Slot of the last prefix token; −1 where the prefix is empty.
        """

    @abstractmethod
    def alloc_decode(self, seq_lens: Int32Array, last_loc: Int32Array) -> Int32Array | None:
        """One slot per request, for the token at ``seq_lens[i] − 1``."""

    @abstractmethod
    def free(self, slots: Int32Array) -> None:
        """Return the pages of ``slots``; a page that is already free is an error."""

    @abstractmethod
    def free_group_begin(self) -> None:
        """Queue the frees that follow until ``free_group_end``."""

    @abstractmethod
    def free_group_end(self) -> None:
        """Perform the queued frees."""

    @abstractmethod
    def backup_state(self) -> AllocatorState:
        """A copy of the free list."""

    @abstractmethod
    def restore_state(self, state: AllocatorState) -> None:
        """Return to a backup; every allocation and free since then is forgotten."""

    @abstractmethod
    def clear(self) -> None:
        """Make everything free."""
