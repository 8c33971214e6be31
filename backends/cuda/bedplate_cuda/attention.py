# SPDX-License-Identifier: Apache-2.0
"""Attention over the paged cache by Triton kernels, recordable in decode.

The kernels are neutral and live in ``bedplate_triton``; here are their workspaces, the few
host integers that they need, and the choice between them and torch's own attention for fresh
prompts.

Shapes: T new tokens, B requests, H query heads, K key/value heads, D key size, Dv value size,
S splits of a request's keys.
"""

from __future__ import annotations

__all__ = ["TritonAttention", "provider"]

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from bedplate.contract import (
    AttentionBackend,
    AttentionBuild,
    AttentionCallSpec,
    AttentionProvider,
    AttentionRequest,
    Support,
)
from bedplate_cuda.ops import device_features
from bedplate_cuda.runtime import NARROW
from bedplate_triton.decode_attention import choose_splits, decode_attention
from bedplate_triton.extend_attention import extend_attention
from bedplate_triton.extend_attention import supports as extend_supports
from bedplate_triton.kv_write import write_kv

if TYPE_CHECKING:
    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate_triton.features import Features

_LONG_PROMPT = 2048
"""Whole prompts from so many tokens on go to cuDNN's attention, which is 1.7 times as fast at
4,096 and not faster at 1,024 (docs/reference/measurements.md)."""
_PLANNED_TOKENS = 1024
"""cuDNN makes a plan for every length, which takes as long as a prompt; so lengths are padded
to multiples of this."""


class TritonAttention(AttentionBackend):
    """Paged attention; the workspaces of decode are made once, for the largest batch.

    The number of splits depends on the batch size and on limits of the build alone, so a
    graph stays valid whatever lengths it is replayed with.

    Args:
        build: Pools, table and limits.
        features: The device; the current one when not given.
    """

    extend_recordable = True

    def __init__(self, build: AttentionBuild, *, features: Features | None = None) -> None:
        self._pool = build.kv_pool
        self._req_to_token = build.req_to_token
        self._max_context_len = build.max_context_len
        device = build.req_to_token.device
        self._features = features or device_features()
        partial, sums = self._workspace_sizes(build)
        self._partial = torch.empty(partial, dtype=torch.float32, device=device)
        self._sums = torch.empty(sums, dtype=torch.float32, device=device)
        most = build.max_batch_size * max(call.num_heads for call in build.calls)
        self._counters = torch.zeros(most, dtype=torch.int32, device=device)
        self._max_extend_len = 0
        self._prompts: list[slice] = []
        self._invariant = build.deterministic
        # Of a cache of eight bits every token reads the same, in whole prompts and in chunks.
        stored_whole = build.kv_pool.dtype == build.dtype and not self._invariant
        self._planned = {
            call.call_id
            for call in build.calls
            if stored_whole and _planned_serves(call, build.dtype, device)
        }
        # A decode pass as an extension by one token each, for those who want fixed bits.
        self._ones = torch.ones(build.max_batch_size, dtype=torch.int32, device=device)
        self._numbers = torch.arange(build.max_batch_size, dtype=torch.int32, device=device)

    def prepare(self, batch: ForwardBatch) -> None:
        """Host integers of a pass with several new tokens; decode needs none."""
        if batch.extend is not None:
            counts = batch.extend.seq_lens_cpu.tolist()
            self._max_extend_len = max(counts)
            fresh = not batch.extend.prefix_lens_cpu.any() and min(counts) >= _LONG_PROMPT
            self._prompts = _slices(counts) if fresh else []

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
        keys, values = self._store(k, v, call, batch)
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
        """Write, then one launch for all requests, or torch's attention for fresh prompts."""
        keys, values = self._store(k, v, call, batch)
        planned = self._prompts and call.call_id in self._planned
        if planned and k is not None and v is not None:
            if len(self._prompts) == 1:
                return _attend_fresh(q, k, v, call.scale)
            out = q.new_empty((q.shape[0], call.num_heads, call.value_dim))
            for rows in self._prompts:
                out[rows] = _attend_fresh(q[rows], k[rows], v[rows], call.scale)
            return out
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

    def _store(
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


def _supports(request: AttentionRequest) -> Support:
    if request.kv_dtype not in (request.dtype, *NARROW):
        return Support.no(
            f"reads keys of the model's {request.dtype} or of {' and '.join(NARROW)}, not "
            f"{request.kv_dtype}"
        )
    dtype = getattr(torch, request.dtype)
    for call in request.calls:
        answer = extend_supports(call.head_dim, call.value_dim, dtype)
        if not answer:
            return Support.no(f"{call.module}: {answer.reason}")
        if not call.causal:
            return Support.no(f"{call.module} sees later tokens")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    planned = _planned_serves(request.calls[0], dtype, device)
    prompts = (
        f"prompts from {_LONG_PROMPT:,} tokens by cuDNN"
        if planned
        else f"prompts too, as {planned.reason}"
    )
    return Support.yes(f"reads the cache in place, in graphs too; {prompts}")


def _planned_serves(
    call: AttentionCallSpec, dtype: torch.dtype, device: torch.device
) -> Support:
    """Whether cuDNN's attention can take whole prompts of a call; tried once."""
    limits = (call.window, call.chunk, call.softcap)
    if call.sinks or call.alias_of is not None or any(limit is not None for limit in limits):
        return Support.no("the call has a window, sinks or the like")
    sizes = (call.head_dim, call.value_dim)
    if sizes[0] != sizes[1] or sizes[0] % 8 or sizes[0] > 128 or dtype == torch.float32:
        return Support.no(
            f"cuDNN has no form for heads of {sizes[0]} and {sizes[1]} in {dtype}"
        )
    return _try_planned(call.num_heads, call.num_kv_heads, call.head_dim, dtype, device)


@lru_cache(maxsize=64)
def _try_planned(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype, device: torch.device
) -> Support:
    q, k, v = (
        torch.zeros((_PLANNED_TOKENS, count, size), dtype=dtype, device=device)
        for count in (heads, kv_heads, kv_heads)
    )
    try:
        _attend_fresh(q, k, v, 1.0)
    except (RuntimeError, NotImplementedError) as error:
        return Support.no(f"cuDNN's attention fails here: {str(error).partition(chr(10))[0]}")
    return Support.yes()


def _attend_fresh(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One whole prompt, ``[T, H, D]``, by cuDNN; padding comes last, where nobody sees it."""
    count = len(q)
    padding = -count % _PLANNED_TOKENS
    if padding:
        q, k, v = (functional.pad(x, (0, 0, 0, 0, 0, padding)) for x in (q, k, v))
    out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        None, False, 0.0, True, False, scale=scale,
    )[0]  # fmt: skip
    return out[0].transpose(0, 1)[:count]


def _slices(counts: list[int]) -> list[slice]:
    """Rows of each request in the packed tokens."""
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _adjacent(rows: Tensor) -> Tensor:
    """The same rows with features side by side, as the kernels read them."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


provider = AttentionProvider(
    name="triton",
    provider="cuda",
    priority=100,
    supports=_supports,
    build=TritonAttention,
    determinism="batch_invariant",
)
"""What this backend offers."""
