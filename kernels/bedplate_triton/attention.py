# SPDX-License-Identifier: Apache-2.0
"""Attention over the paged cache by these kernels, recordable in decode.

Here are the workspaces of the kernels and the few host integers that they need.  Backends
inherit from ``PagedAttention`` and add what only their device has.

Shapes: T new tokens, B requests, H query heads, K key/value heads, D key size, Dv value size,
S splits of a request's keys.
"""

from __future__ import annotations

__all__ = ["PagedAttention", "supports"]

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bedplate.contract import (
    AttentionBackend,
    AttentionBuild,
    AttentionCallSpec,
    AttentionRequest,
    Support,
)
from bedplate_triton.decode_attention import choose_splits, decode_attention
from bedplate_triton.extend_attention import extend_attention
from bedplate_triton.extend_attention import supports as extend_supports
from bedplate_triton.kv_write import write_kv
from bedplate_triton.sizes import column_blocks, power_of_two

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate_triton.features import Features


def supports(request: AttentionRequest, narrow: Sequence[str]) -> Support:
    """Whether the kernels serve all calls of a model.

    Args:
        request: What is asked.
        narrow: Torch dtypes that a cache may have besides the model's own.
    """
    if request.kv_dtype not in (request.dtype, *narrow):
        others = f" or of {' and '.join(narrow)}" if narrow else ""
        return Support.no(
            f"reads keys of the model's {request.dtype}{others}, not {request.kv_dtype}"
        )
    dtype = getattr(torch, request.dtype)
    for call in request.calls:
        answer = extend_supports(call.head_dim, call.value_dim, dtype)
        if not answer:
            return Support.no(f"{call.module}: {answer.reason}")
        if not call.causal:
            return Support.no(f"{call.module} sees later tokens")
        if request.kv_dtype in narrow and (call.value_in_key or _is_ragged(call)):
            return Support.no(
                f"{call.module} has values in its keys or heads of {call.head_dim} and "
                f"{call.value_dim}; prompts over a cache of {request.kv_dtype} with both "
                "differed from plain torch on an H200, and which of them it is nobody knows"
            )
    return Support.yes("reads the cache in place, in graphs too")


def _is_ragged(call: AttentionCallSpec) -> bool:
    """Whether tiles of keys or values have columns that no head has."""
    return (
        sum(column_blocks(call.head_dim)) != call.head_dim
        or power_of_two(call.value_dim) != call.value_dim
    )


class PagedAttention(AttentionBackend):
    """Paged attention; the workspaces of decode are made once, for the largest batch.

    The number of splits depends on the batch size and on limits of the build alone, so a
    graph stays valid whatever lengths it is replayed with.

    Args:
        build: Pools, table and limits.
        features: The device.
    """

    extend_recordable = True

    def __init__(self, build: AttentionBuild, features: Features) -> None:
        self._pool = build.kv_pool
        self._req_to_token = build.req_to_token
        self._max_context_len = build.max_context_len
        device = build.req_to_token.device
        self._features = features
        partial, sums = self._workspace_sizes(build)
        self._partial = torch.empty(partial, dtype=torch.float32, device=device)
        self._sums = torch.empty(sums, dtype=torch.float32, device=device)
        most = build.max_batch_size * max(call.num_heads for call in build.calls)
        self._counters = torch.zeros(most, dtype=torch.int32, device=device)
        self._max_extend_len = 0
        self._invariant = build.deterministic
        # A decode pass as an extension by one token each, for those who want fixed bits.
        self._ones = torch.ones(build.max_batch_size, dtype=torch.int32, device=device)
        self._numbers = torch.arange(build.max_batch_size, dtype=torch.int32, device=device)

    def prepare(self, batch: ForwardBatch) -> None:
        """Host integers of a pass with several new tokens; decode needs none."""
        if batch.extend is not None:
            self._max_extend_len = int(batch.extend.seq_lens_cpu.max())

    def graph_key(self, batch: ForwardBatch) -> tuple[int, ...]:
        """The longest extension reaches the kernel; nothing of a decode batch does."""
        return () if batch.extend is None else (int(batch.extend.seq_lens_cpu.max()),)

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
        """Write, attend in splits, merge: two or three launches."""
        keys, values = self.store(k, v, call, batch)
        size = q.shape[0]
        if self._invariant:
            places = (self._numbers[:size], self._ones[:size])
            return self._extend(q, keys, values, call, batch, places, 1, sinks)
        splits = self._splits(call, size)
        out = q.new_empty((size, call.num_heads, call.value_dim))
        sums = self._sums[: size * call.num_heads * splits]
        partial = self._partial
        if splits > 1:
            partial = partial[: sums.numel() * call.value_dim]
            partial = partial.view(size, call.num_heads, splits, call.value_dim)
        decode_attention(
            _adjacent(q),
            keys,
            values,
            self._req_to_token,
            batch.req_pool_indices,
            batch.seq_lens,
            out,
            partial,
            sums.view(size, call.num_heads, splits),
            features=self._features,
            counters=self._counters,
            scale=call.scale,
            window=call.window or 0,
            chunk=call.chunk or 0,
            softcap=call.softcap or 0.0,
            sinks=sinks,
        )
        return out

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
        """Write, then one launch for all requests."""
        keys, values = self.store(k, v, call, batch)
        extend = batch.extend
        assert extend is not None  # the mode says so
        places, longest = (extend.start_loc, extend.seq_lens), self._max_extend_len
        return self._extend(q, keys, values, call, batch, places, longest, sinks)

    def _extend(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        call: AttentionCallSpec,
        batch: ForwardBatch,
        places: tuple[Tensor, Tensor],
        longest: int,
        sinks: Tensor | None,
    ) -> Tensor:
        """One launch for all requests; ``places`` are first rows and counts of new tokens."""
        out = q.new_empty((q.shape[0], call.num_heads, call.value_dim))
        extend_attention(
            _adjacent(q),
            keys,
            values,
            self._req_to_token,
            batch.req_pool_indices,
            batch.seq_lens,
            *places,
            out,
            features=self._features,
            max_extend_len=longest,
            scale=call.scale,
            causal=call.causal,
            window=call.window or 0,
            chunk=call.chunk or 0,
            softcap=call.softcap or 0.0,
            sinks=sinks,
            invariant=self._invariant,
        )
        return out

    def store(
        self, k: Tensor | None, v: Tensor | None, call: AttentionCallSpec, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """Write what is new, if the call stores any; the pools that it attends to."""
        keys, values = self._pool.key(call.cache_id), self._pool.value(call.cache_id)
        if k is not None and call.alias_of is None:
            fresh = None if v is None or call.value_in_key else _adjacent(v)
            write_kv(
                _adjacent(k), fresh, batch.out_cache_loc, keys, values, features=self._features
            )
        return keys, values

    def _splits(self, call: AttentionCallSpec, batch_size: int) -> int:
        """S."""
        limits = (self._max_context_len, call.window, call.chunk)
        return choose_splits(
            self._features,
            batch_size=batch_size,
            num_heads=call.num_heads,
            num_kv_heads=call.num_kv_heads,
            head_dim=call.head_dim,
            value_dim=call.value_dim,
            kv_dtype=self._pool.dtype,
            max_context_len=min(limit for limit in limits if limit is not None),
        )

    def _workspace_sizes(self, build: AttentionBuild) -> tuple[int, int]:
        """Elements of the partial results and of their sums, for every batch and call."""
        partial = sums = 0
        for call in build.calls:
            for size in range(1, build.max_batch_size + 1):
                splits = self._splits(call, size)
                needed = size * call.num_heads * splits
                sums = max(sums, needed)
                partial = max(partial, needed * call.value_dim * (splits > 1))
        return partial, sums


def _adjacent(rows: Tensor) -> Tensor:
    """The same rows with features side by side, as the kernels read them."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()
