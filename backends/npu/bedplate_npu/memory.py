# SPDX-License-Identifier: Apache-2.0
"""Keys and values in pages as fused-infer attention reads them.

Two contiguous tensors a layer, as the core makes them; page 0 is scratch.  Only latent caches
differ: the operator reads the latent and its rotated part from two tensors, and a view of one
would not be contiguous.

Shapes: P pages, K key/value heads, D key size, Dv value size.
"""

from __future__ import annotations

__all__ = ["NpuKVPool"]

from typing import TYPE_CHECKING

import torch

from bedplate.errors import ContractError
from bedplate.memory.kv_pool import LayeredKVPool
from bedplate_npu import ops

if TYPE_CHECKING:
    from torch import Tensor

    from bedplate.contract import AttentionCallSpec, KVPoolRequest


class NpuKVPool(LayeredKVPool):
    """The core's pool, with latents in two parts and pages of fixed size.

    Raises:
        ContractError: The page size is another than ``ops.PAGE_SIZE``.
    """

    def __init__(self, request: KVPoolRequest) -> None:
        if request.page_size != ops.PAGE_SIZE:
            raise ContractError(
                f"pages of {request.page_size} tokens: attention on this device is right with "
                f"{ops.PAGE_SIZE} only. Leave --page-size out"
            )
        super().__init__(request)

    def pages(self, call_id: int) -> tuple[Tensor, Tensor]:
        """``[P, PAGE_SIZE, K·D]``: the same, as attention takes them."""
        return tuple(  # type: ignore[return-value]
            part.view(-1, self.page_size, part[0].numel()) for part in self._parts(call_id)
        )

    def key(self, call_id: int) -> Tensor:
        """``[num_slots, K, D]``, the live storage; of latents a copy: the parts lie apart."""
        if self._calls[call_id].value_in_key:
            return torch.cat(self._parts(call_id), dim=-1)
        return super().key(call_id)

    def write(self, call_id: int, slots: Tensor, k: Tensor, v: Tensor | None) -> None:
        """Store by one operator, or by two indexed copies of a dtype that it has not.

        See ``KVPool.write``.
        """
        call = self._calls[call_id]
        if call.alias_of is not None:
            return
        if call.value_in_key:
            k, v = k[..., : call.value_dim], k[..., call.value_dim :]
        if v is None:
            raise ContractError(
                f"attention call {call_id} ({call.module}) stores values, but got none"
            )
        keys, values = self._parts(call_id)
        ops.write_kv(k, v, keys=keys, values=values, slots=slots)

    def _parts(self, call_id: int) -> tuple[Tensor, Tensor]:
        return self._keys[call_id], self._values[call_id]

    def _add(self, call: AttentionCallSpec) -> None:
        if not call.value_in_key:
            super()._add(call)
            return
        widths = (call.value_dim, call.head_dim - call.value_dim)
        latent, rope = (self._allocate(call.num_kv_heads, width) for width in widths)
        self._keys[call.call_id], self._values[call.call_id] = latent, rope

    def value(self, call_id: int) -> Tensor:
        """``[num_slots, K, Dv]``; of latents the latent itself."""
        latent = self._calls[call_id].value_in_key
        return self._keys[call_id] if latent else super().value(call_id)
