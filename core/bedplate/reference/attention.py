# SPDX-License-Identifier: Apache-2.0
"""Paged attention by gather and softmax, one request at a time.

The oracle of every other implementation: it supports all that an ``AttentionCallSpec`` can
say, and computes in float32.

Shapes: T new tokens, n of one request, L its length, H query heads, K key/value heads.
"""

from __future__ import annotations

__all__ = ["ReferenceAttention", "attend", "reference_provider", "store", "visible"]

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bedplate.contract.attention import (
    AttentionBackend,
    AttentionBuild,
    AttentionCallSpec,
    AttentionProvider,
)
from bedplate.contract.decisions import Support

if TYPE_CHECKING:
    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.contract.memory import KVPool


def visible(query_pos: Tensor, key_pos: Tensor, call: AttentionCallSpec) -> Tensor:
    """``[n, L]`` bool: which keys each query sees, by causality, window and chunk."""
    q, k = query_pos[:, None], key_pos[None, :]
    mask = k <= q if call.causal else torch.ones_like(k <= q)
    if call.window is not None:
        mask = mask & (k > q - call.window)
    if call.chunk is not None:
        mask = mask & (k // call.chunk == q // call.chunk)
    return mask


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, call: AttentionCallSpec, sinks: Tensor | None
) -> Tensor:
    """One request: ``q [n, H, D]``, ``k [L, K, D]``, ``v [L, K, Dv]`` → ``[n, H, Dv]``."""
    groups = call.num_heads // call.num_kv_heads
    keys = k.float().repeat_interleave(groups, dim=1)
    values = v.float().repeat_interleave(groups, dim=1)
    scores = torch.einsum("nhd,lhd->hnl", q.float(), keys) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        probs = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    else:
        probs = torch.softmax(scores, dim=-1)
    return torch.einsum("hnl,lhd->nhd", probs, values).to(q.dtype)


def store(
    pool: KVPool,
    k: Tensor | None,
    v: Tensor | None,
    call: AttentionCallSpec,
    batch: ForwardBatch,
) -> None:
    """Write the new keys and values of one call, if it stores any."""
    if k is not None and call.alias_of is None:
        pool.write(call.call_id, batch.out_cache_loc, k, v)


class ReferenceAttention(AttentionBackend):
    """A Python loop over the requests; supports everything."""

    def __init__(self, build: AttentionBuild) -> None:
        self._pool = build.kv_pool
        self._req_to_token = build.req_to_token

    def prepare(self, batch: ForwardBatch) -> None:
        """Nothing to prepare."""

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
        """Store, then attend request by request."""
        store(self._pool, k, v, call, batch)
        extend = batch.extend
        counts = [1] * batch.batch_size if extend is None else extend.seq_lens_cpu.tolist()
        out = q.new_zeros((q.shape[0], call.num_heads, call.value_dim))
        start = 0
        for request, count in enumerate(counts):
            rows = slice(start, start + count)
            out[rows] = self._request(q[rows], call, batch, request, sinks)
            start += count
        return out

    forward_decode = forward_extend

    def _request(
        self,
        q: Tensor,
        call: AttentionCallSpec,
        batch: ForwardBatch,
        request: int,
        sinks: Tensor | None,
    ) -> Tensor:
        length = int(batch.seq_lens_cpu[request])
        if not len(q) or not length:
            return q.new_zeros((len(q), call.num_heads, call.value_dim))
        slots = self._req_to_token[batch.req_pool_indices[request].long(), :length].long()
        key_pos = torch.arange(length, device=q.device)
        mask = visible(key_pos[length - len(q) :], key_pos, call)
        keys = self._pool.key(call.cache_id)[slots]
        values = self._pool.value(call.cache_id)[slots]
        return attend(q, keys, values, mask, call, sinks)


reference_provider = AttentionProvider(
    name="reference",
    provider="reference",
    priority=0,
    supports=lambda _request: Support.yes("plain torch, one request at a time"),
    build=ReferenceAttention,
)
"""The last candidate of every choice of attention."""
