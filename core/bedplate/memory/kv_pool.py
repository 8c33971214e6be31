# SPDX-License-Identifier: Apache-2.0
"""LayeredKVPool: keys and values of every attention call, in plain torch.

The core's default behind ``KVPool``.  It is built from the calls that a model really makes,
so mixed head sizes, latent caches and calls that read another's cache are one mechanism: each
call has its own geometry.  Attention backends write and read it.

Shapes: T tokens, K key/value heads, D key size, Dv value size; token-major storage
``[num_slots, K, D]``, so that a page is one contiguous piece.
"""

from __future__ import annotations

__all__ = ["LayeredKVPool"]

from typing import TYPE_CHECKING

import torch

from bedplate.contract.memory import HostKVCopy, KVPool
from bedplate.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from bedplate.contract.attention import AttentionCallSpec
    from bedplate.contract.memory import KVPoolRequest

_CHUNK_SLOTS = 8192
"""Slots that travel to or from the host at once; bounds the extra device memory."""


class LayeredKVPool(KVPool):
    """One tensor for keys and one for values per call that stores.

    Everything starts as zero: what lies in page 0 or was never written is finite, so a kernel
    that reads and masks it cannot spread a NaN.

    Args:
        request: Calls, sizes, dtype and device.

    Raises:
        ContractError: The calls or the sizes contradict each other; all faults are listed.
    """

    def __init__(self, request: KVPoolRequest) -> None:
        _check(request)
        self.num_tokens = request.num_tokens
        self.page_size = request.page_size
        self.dtype = request.dtype
        self._runtime = request.runtime
        self._calls = {call.call_id: call for call in request.calls}
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._stored: list[Tensor] = []
        for call in request.calls:
            if call.alias_of is None:
                self._add(call)
        for call in request.calls:
            self._keys[call.call_id] = self._keys[call.cache_id]
            self._values[call.call_id] = self._values[call.cache_id]

    @property
    def num_slots(self) -> int:
        """Slots of each call, those of page 0 included."""
        return self.num_tokens + self.page_size

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held."""
        return sum(stored.nbytes for stored in self._stored)

    def key(self, call_id: int) -> Tensor:
        """``[num_slots, K, D]``, the live storage; an alias's is its target's."""
        return self._keys[call_id]

    def value(self, call_id: int) -> Tensor:
        """``[num_slots, K, Dv]``; for latent calls the first Dv columns of the key."""
        return self._values[call_id]

    def write(self, call_id: int, slots: Tensor, k: Tensor, v: Tensor | None) -> None:
        """Store ``k[i], v[i]`` at ``slots[i]``, cast to the pool's dtype.

        Recordable: two indexed copies into storage that never moves; nothing is allocated
        when the dtypes agree, and nothing waits.

        Args:
            call_id: The call; an alias writes nothing.
            slots: ``[T]`` int32 or int64 on the device; slot 0 swallows padding.
            k: ``[T, K, D]``, strides are free.
            v: ``[T, K, Dv]``, strides are free; not read for latent calls.

        Raises:
            ContractError: The shapes are not those of the call.
        """
        call = self._calls[call_id]
        if call.alias_of is not None:
            return
        _store(self._keys[call_id], slots, k)
        if not call.value_in_key:
            if v is None:
                raise ContractError(
                    f"attention call {call_id} ({call.module}) stores values, but got none"
                )
            _store(self._values[call_id], slots, v)

    def move(self, target_slots: Tensor, source_slots: Tensor) -> None:
        """Copy slots to slots in every call; reads all before it writes, so sets may overlap.

        Raises:
            ContractError: The two differ in length.
        """
        if target_slots.shape != source_slots.shape:
            raise ContractError(
                f"cannot move {len(source_slots)} slots to {len(target_slots)}; "
                "name as many targets as sources"
            )
        for stored in self._stored:
            stored.index_put_((target_slots,), stored[source_slots])

    def get_cpu_copy(self, slots: Tensor) -> HostKVCopy:
        """Copy slots of every call to the host, in chunks; waits for the device.

        Returns:
            ``tensors[i][j]``: stored tensor i (keys, values, next call …), chunk j.
        """
        self._runtime.synchronize()
        chunks = torch.split(slots, _CHUNK_SLOTS)
        tensors = tuple(
            tuple(stored[chunk].to("cpu") for chunk in chunks) for stored in self._stored
        )
        self._runtime.synchronize()
        return HostKVCopy(len(slots), tensors)

    def load_cpu_copy(self, copy: HostKVCopy, slots: Tensor) -> None:
        """Inverse of ``get_cpu_copy``; checked before anything is written; waits.

        Raises:
            ContractError: The copy holds another number of slots, or is of other calls.
        """
        self._check_copy(copy, slots)
        for stored, chunks in zip(self._stored, copy.tensors, strict=True):
            for part, chunk in zip(torch.split(slots, _CHUNK_SLOTS), chunks, strict=True):
                stored.index_put_((part,), chunk.to(stored.device))
        self._runtime.synchronize()

    def _add(self, call: AttentionCallSpec) -> None:
        key = self._allocate(call.num_kv_heads, call.head_dim)
        self._keys[call.call_id] = key
        self._values[call.call_id] = (
            key[..., : call.value_dim]
            if call.value_in_key
            else self._allocate(call.num_kv_heads, call.value_dim)
        )

    def _allocate(self, num_heads: int, size: int) -> Tensor:
        shape = (self.num_slots, num_heads, size)
        stored = torch.zeros(shape, dtype=_storage(self.dtype), device=self._runtime.device)
        self._stored.append(stored)
        return stored.view(self.dtype)

    def _check_copy(self, copy: HostKVCopy, slots: Tensor) -> None:
        if copy.num_tokens != len(slots):
            raise ContractError(
                f"cannot load {copy.num_tokens} slots into {len(slots)}; name as many"
            )
        ours = [(stored.shape[1:], stored.dtype) for stored in self._stored]
        theirs = [(chunks[0].shape[1:], chunks[0].dtype) for chunks in copy.tensors]
        if ours != theirs:
            raise ContractError(
                f"a host copy of {_geometry(theirs)} does not fit a pool of "
                f"{_geometry(ours)}; load it into a pool of the same calls and dtype"
            )


def _store(storage: Tensor, slots: Tensor, rows: Tensor) -> None:
    if rows.shape != (len(slots), *storage.shape[1:]):
        raise ContractError(
            f"cannot store {list(rows.shape)} at {len(slots)} slots of "
            f"{list(storage.shape[1:])}; one row a slot"
        )
    rows = rows.to(storage.dtype)
    raw = _storage(storage.dtype)
    if raw is not storage.dtype:
        storage, rows = storage.view(raw), rows.view(raw)
    storage.index_put_((slots,), rows)


def _storage(dtype: torch.dtype) -> torch.dtype:
    """Bytes for one-byte floats, which not every device can index; else the dtype itself."""
    one_byte = dtype.is_floating_point and dtype.itemsize == 1
    return torch.uint8 if one_byte else dtype


def _geometry(tensors: Iterable[tuple[torch.Size, torch.dtype]]) -> str:
    return ", ".join(f"{list(shape)} {dtype}" for shape, dtype in tensors)


def _check(request: KVPoolRequest) -> None:
    faults = list(_faults(request))
    if faults:
        raise ContractError(
            f"no KV pool can be made: {'; '.join(faults)}. Pass calls as the probe saw them"
        )


def _faults(request: KVPoolRequest) -> Iterator[str]:
    if request.page_size < 1 or request.num_tokens % max(request.page_size, 1):
        yield f"{request.num_tokens} tokens are no multiple of page size {request.page_size}"
    calls = {call.call_id: call for call in request.calls}
    if len(calls) != len(request.calls):
        yield "two calls have one call_id"
    for call in request.calls:
        if call.value_in_key and call.value_dim > call.head_dim:
            yield (
                f"call {call.call_id} has values of {call.value_dim} columns within keys of "
                f"{call.head_dim}"
            )
        if call.alias_of is not None:
            yield from _alias_faults(call, calls.get(call.alias_of))


def _alias_faults(call: AttentionCallSpec, target: AttentionCallSpec | None) -> Iterator[str]:
    if target is None or target.alias_of is not None:
        yield f"call {call.call_id} reads call {call.alias_of}, which stores nothing"
    elif _cache_shape(call) != _cache_shape(target):
        yield (
            f"call {call.call_id} reads {_cache_shape(call)} (K, D, Dv, latent), but call "
            f"{target.call_id} stores {_cache_shape(target)}"
        )


def _cache_shape(call: AttentionCallSpec) -> tuple[int, int, int, bool]:
    return call.num_kv_heads, call.head_dim, call.value_dim, call.value_in_key
