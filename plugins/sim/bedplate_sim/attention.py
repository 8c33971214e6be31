# SPDX-License-Identifier: Apache-2.0
"""Attention over the paged cache, as one piece of work for all requests.

It reads lengths and slots where the device keeps them, when it runs: a graph serves any
lengths, and what the host gets wrong on the way there shows.

Shapes: T new tokens, B requests, L length of one, H query heads, K key/value heads.
"""

from __future__ import annotations

__all__ = ["SimAttention", "provider", "supports"]

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bedplate.contract import (
    AttentionBackend,
    AttentionBuild,
    AttentionCallSpec,
    AttentionProvider,
    AttentionRequest,
    Support,
)
from bedplate.reference.attention import attend, store, visible
from bedplate_sim.operations import kernel

if TYPE_CHECKING:
    from bedplate.batch.forward_batch import ForwardBatch

_DTYPES = ("float32", "bfloat16", "float16")


def supports(request: AttentionRequest) -> Support:
    """Any call, over real numbers."""
    for dtype in (request.dtype, request.kv_dtype):
        if dtype not in _DTYPES:
            return Support.no(f"{dtype} is not among {', '.join(_DTYPES)}")
    return Support.yes("the reference's arithmetic, in one piece of work")


class SimAttention(AttentionBackend):
    """The reference's arithmetic, on the device's side."""

    extend_recordable = True

    def __init__(self, build: AttentionBuild) -> None:
        self._pool = build.kv_pool
        self._req_to_token = build.req_to_token

    def prepare(self, batch: ForwardBatch) -> None:
        """Nothing is made on the host."""

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
        """Store, then attend; rows that belong to no request are left as they are."""
        store(self._pool, k, v, call, batch)
        counts = None if batch.extend is None else batch.extend.seq_lens
        inputs = (
            q, self._pool.key(call.cache_id), self._pool.value(call.cache_id),
            self._req_to_token, batch.req_pool_indices, batch.seq_lens, counts, sinks,
        )  # fmt: skip
        out = q.new_empty((q.shape[0], call.num_heads, call.value_dim))
        return kernel("paged attention", lambda *reals: _attend(call, *reals), inputs, out)

    forward_decode = forward_extend


def _attend(
    call: AttentionCallSpec,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    counts: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    start = 0
    new = [1] * len(rows) if counts is None else counts.tolist()
    for row, length, count in zip(rows.tolist(), seq_lens.tolist(), new, strict=True):
        if count and length:
            part = slice(start, start + count)
            slots = table[row, :length].long()
            positions = torch.arange(length)
            mask = visible(positions[length - count :], positions, call)
            out[part] = attend(q[part], keys[slots], values[slots], mask, call, sinks)
        start += count


provider = AttentionProvider(
    name="paged",
    provider="sim",
    priority=100,
    supports=supports,
    build=SimAttention,
    determinism="run_to_run",
)
"""What this backend offers."""
