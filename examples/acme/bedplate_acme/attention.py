# SPDX-License-Identifier: Apache-2.0
"""Attention over the paged cache by torch's fused call.

Shapes: T new tokens, B requests, L longest length, H query heads, K key/value heads,
D key size, Dv value size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from bedplate.contract import (
    AttentionBackend,
    AttentionBuild,
    AttentionCallSpec,
    AttentionProvider,
    AttentionRequest,
    Support,
)
from bedplate.reference.attention import store, visible

if TYPE_CHECKING:
    from torch import Tensor

    from bedplate.batch.forward_batch import ForwardBatch


def supports(request: AttentionRequest) -> Support:
    """Whether the fused call can serve every attention call of the model."""
    for call in request.calls:
        if call.softcap is not None:
            return Support.no(f"{call.module} caps its scores")
        if call.sinks:
            return Support.no(f"{call.module} has sinks")
    return Support.yes("one fused call for all requests in decode, one each otherwise")


class AcmeAttention(AttentionBackend):
    """Gathers the pages of a request and attends to them."""

    def __init__(self, build: AttentionBuild) -> None:
        self._pool = build.kv_pool
        self._req_to_token = build.req_to_token
        self._slots: Tensor
        self._lengths: Tensor

    def prepare(self, batch: ForwardBatch) -> None:
        """Look up every request's slots once for all layers: ``[B, L]``."""
        self._lengths = batch.seq_lens.long()
        longest = int(batch.seq_lens_cpu.max())
        rows = self._req_to_token[batch.req_pool_indices.long(), :longest].long()
        past_the_end = torch.arange(longest, device=rows.device) >= self._lengths[:, None]
        self._slots = rows.masked_fill(past_the_end, 0)

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        call: AttentionCallSpec,
        batch: ForwardBatch,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """One query a request: all of them in one call, the short ones masked."""
        store(self._pool, k, v, call, batch)
        keys, values = self._gather(self._slots, call, q)
        positions = torch.arange(self._slots.shape[1], device=q.device)
        last = self._lengths - 1
        mask = visible(last, positions, call) & (positions <= last[:, None])
        # Query heads that share a key become rows of one small matrix: nothing is repeated.
        grouped = q.reshape(len(q), call.num_kv_heads, -1, call.head_dim)
        out = scaled_dot_product_attention(
            grouped,
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask[:, None, None],
            scale=call.scale,
        )
        return out.reshape(len(q), call.num_heads, call.value_dim)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        call: AttentionCallSpec,
        batch: ForwardBatch,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Several queries a request: one call each."""
        store(self._pool, k, v, call, batch)
        out = q.new_zeros((len(q), call.num_heads, call.value_dim))
        start = 0
        for request, (new, length) in enumerate(_spans(batch)):
            rows = slice(start, start + new)
            start += new
            if new:
                slots = self._slots[request, :length]
                out[rows] = self._attend(q[rows], slots, call)
        return out

    def _attend(self, q: Tensor, slots: Tensor, call: AttentionCallSpec) -> Tensor:
        """The last n tokens of one request: ``[n, H, D]`` to ``[n, H, Dv]``."""
        keys, values = self._gather(slots, call, q)
        positions = torch.arange(len(slots), device=q.device)
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=visible(positions[len(slots) - len(q) :], positions, call),
            scale=call.scale,
            enable_gqa=call.num_heads != call.num_kv_heads,
        )
        return out[0].transpose(0, 1)

    def _gather(
        self, slots: Tensor, call: AttentionCallSpec, q: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys ``[*slots, K, D]`` and values ``[*slots, K, Dv]`` in the queries' dtype."""
        keys = self._pool.key(call.cache_id)[slots].to(q.dtype)
        if call.value_in_key:
            return keys, keys[..., : call.value_dim]
        return keys, self._pool.value(call.cache_id)[slots].to(q.dtype)


def _spans(batch: ForwardBatch) -> list[tuple[int, int]]:
    """(new tokens, length) of every request, from the host's mirrors."""
    lengths = batch.seq_lens_cpu.tolist()
    extend = batch.extend
    new = [1] * len(lengths) if extend is None else extend.seq_lens_cpu.tolist()
    return list(zip(new, lengths, strict=True))


provider = AttentionProvider(
    name="acme", provider="acme", priority=100, supports=supports, build=AcmeAttention
)
