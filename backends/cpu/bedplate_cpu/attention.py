# SPDX-License-Identifier: Apache-2.0
"""Attention on the host.

Extend makes one fused torch call per request, which is where the time goes anyway.  Decode has
two forms: ``native`` reads the paged cache in place with a kernel in C, and ``sdpa`` gathers
the pages of requests of similar length and makes one fused torch call for them.

Shapes: T new tokens, B requests, L padded length, H query heads, K key/value heads.
"""

from __future__ import annotations

__all__ = ["NativeAttention", "SdpaAttention", "providers"]

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bedplate.contract import (
    AttentionBackend,
    AttentionBuild,
    AttentionCallSpec,
    AttentionProvider,
    AttentionRequest,
    Support,
)
from bedplate.errors import ContractError
from bedplate.reference.attention import attend, store, visible
from bedplate_cpu import native

if TYPE_CHECKING:
    from bedplate.batch.forward_batch import ForwardBatch

_MAX_GROUP, _MAX_DIM = 64, 1024
"""Sizes of the native kernel's stack buffers."""

_WASTE = 1.5
"""Requests share a gather while the longest is at most so many times the shortest."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Decode requests of similar length.

    Attributes:
        rows: ``[b]`` int64 rows of the batch.
        slots: ``[b, L]`` int64; the tail of shorter requests repeats slot 0.
        query_pos: ``[b]`` position of the new token.
    """

    rows: Tensor
    slots: Tensor
    query_pos: Tensor


def providers() -> list[AttentionProvider]:
    """What this backend offers."""
    return [
        AttentionProvider(
            name="native",
            provider="cpu",
            priority=110,
            supports=_native_supports,
            build=NativeAttention,
        ),
        AttentionProvider(
            name="sdpa",
            provider="cpu",
            priority=100,
            supports=_sdpa_supports,
            build=SdpaAttention,
        ),
    ]


def _native_supports(request: AttentionRequest) -> Support:
    kernels = native.load()
    if kernels.library is None:
        return Support.no(kernels.reason)
    if {request.dtype, request.kv_dtype} - {"float32", "bfloat16"}:
        return Support.no(f"has no form for {request.dtype} with {request.kv_dtype} keys")
    for call in request.calls:
        group = call.num_heads // call.num_kv_heads
        if group > _MAX_GROUP or max(call.head_dim, call.value_dim) > _MAX_DIM:
            return Support.no(f"{call.module}: {group} heads of {call.head_dim} share one key")
    return Support.yes(f"reads the cache in place; {kernels.reason}")


def _sdpa_supports(request: AttentionRequest) -> Support:
    for call in request.calls:
        if call.softcap is not None:
            return Support.no(f"{call.module} caps its scores, which the fused call cannot")
        if call.sinks:
            return Support.no(f"{call.module} has sinks, which the fused call cannot")
    return Support.yes("one fused call for decode requests of similar length")


class SdpaAttention(AttentionBackend):
    """Fused attention over gathered pages."""

    def __init__(self, build: AttentionBuild) -> None:
        self._pool = build.kv_pool
        self._req_to_token = build.req_to_token
        self._groups: list[_Group] = []
        self._masks: dict[tuple[int | None, int | None], list[Tensor]] = {}
        self._slots: list[Tensor] = []

    def prepare(self, batch: ForwardBatch) -> None:
        """Look up the slots once for all layers; masks are made when first needed."""
        self._masks.clear()
        if batch.mode.is_decode():
            self._groups = [self._group(batch, rows) for rows in _similar(batch.seq_lens_cpu)]
        else:
            self._slots = self._lookup(batch)

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
        """One fused call per group of similar lengths."""
        store(self._pool, k, v, call, batch)
        masks = self._decode_masks(call)
        if len(self._groups) == 1:
            return self._decode_group(q, call, self._groups[0], masks[0])
        out = q.new_empty((q.shape[0], call.num_heads, call.value_dim))
        for group, mask in zip(self._groups, masks, strict=True):
            out[group.rows] = self._decode_group(q[group.rows], call, group, mask)
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
        """One fused call per request."""
        store(self._pool, k, v, call, batch)
        out = q.new_zeros((q.shape[0], call.num_heads, call.value_dim))
        start = 0
        for slots, count in zip(self._slots, _counts(batch), strict=True):
            if count:
                rows = slice(start, start + count)
                fresh = (
                    None if k is None or v is None or count < len(slots) else (k[rows], v[rows])
                )
                out[rows] = self._extend_one(q[rows], call, slots, fresh, sinks)
            start += count
        return out

    def _group(self, batch: ForwardBatch, rows: Tensor) -> _Group:
        lengths = batch.seq_lens_cpu[rows].long()
        longest = int(lengths.max())
        table = self._req_to_token[batch.req_pool_indices[rows].long(), :longest].long()
        table.masked_fill_(torch.arange(longest) >= lengths[:, None], 0)
        return _Group(rows, table, lengths - 1)

    def _lookup(self, batch: ForwardBatch) -> list[Tensor]:
        rows, lengths = batch.req_pool_indices.tolist(), batch.seq_lens_cpu.tolist()
        return [
            self._req_to_token[row, :length].long()
            for row, length in zip(rows, lengths, strict=True)
        ]

    def _decode_masks(self, call: AttentionCallSpec) -> list[Tensor]:
        key = (call.window, call.chunk)
        if key not in self._masks:
            self._masks[key] = [_decode_mask(group, call) for group in self._groups]
        return self._masks[key]

    def _decode_group(
        self, q: Tensor, call: AttentionCallSpec, group: _Group, mask: Tensor
    ) -> Tensor:
        shape = (*group.slots.shape, call.num_kv_heads, -1)
        flat = group.slots.view(-1)
        keys = self._pool.key(call.cache_id).index_select(0, flat).view(shape)
        if call.value_in_key:
            values = keys[..., : call.value_dim]
        else:
            values = self._pool.value(call.cache_id).index_select(0, flat).view(shape)
        # Query heads of one key/value head become rows of one small matrix: no repetition.
        groups = call.num_heads // call.num_kv_heads
        packed = q.reshape(q.shape[0], call.num_kv_heads, groups, call.head_dim)
        out = scaled_dot_product_attention(
            packed,
            keys.transpose(1, 2).to(q.dtype),
            values.transpose(1, 2).to(q.dtype),
            attn_mask=mask.to(q.dtype),
            scale=call.scale,
        )
        return out.reshape(q.shape[0], call.num_heads, call.value_dim)

    def _extend_one(
        self,
        q: Tensor,
        call: AttentionCallSpec,
        slots: Tensor,
        fresh: tuple[Tensor, Tensor] | None,
        sinks: Tensor | None,
    ) -> Tensor:
        if fresh is not None:
            keys, values = fresh
        else:
            keys = self._pool.key(call.cache_id).index_select(0, slots).to(q.dtype)
            values = self._pool.value(call.cache_id).index_select(0, slots).to(q.dtype)
        count, length = q.shape[0], len(slots)
        plain = call.causal and call.window is None and call.chunk is None
        whole = plain and count == length
        mask = None
        if not whole or call.softcap is not None or sinks is not None:
            positions = torch.arange(length)
            mask = visible(positions[length - count :], positions, call)
        if mask is not None and (call.softcap is not None or sinks is not None):
            return attend(q, keys, values, mask, call, sinks)
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=whole,
            scale=call.scale,
            enable_gqa=call.num_heads != call.num_kv_heads,
        )
        return out[0].transpose(0, 1)


class _DecodeArgs(ctypes.Structure):
    """Mirror of ``DecodeArgs`` in decode_attention.c."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("q", "k", "v", "out", "table", "rows", "lens", "sinks")
        ),
        *((name, ctypes.c_int64) for name in ("q_stride", "head_stride", "table_stride")),
        *(
            (name, ctypes.c_int32)
            for name in ("batch", "heads", "kv_heads", "dim", "value_dim", "v_width")
        ),
        ("window", ctypes.c_int32),
        ("chunk", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("q_bf16", ctypes.c_int32),
        ("kv_bf16", ctypes.c_int32),
    )


class NativeAttention(SdpaAttention):
    """Decode by the kernel in C; everything else as ``SdpaAttention``."""

    def __init__(self, build: AttentionBuild) -> None:
        super().__init__(build)
        library = native.load().library
        assert library is not None  # _native_supports was asked
        self._kernel = library.bedplate_decode_attention
        self._args = [self._fixed_args(call) for call in build.calls]

    def prepare(self, batch: ForwardBatch) -> None:
        """Decode needs no metadata: the kernel reads the table itself."""
        if not batch.mode.is_decode():
            super().prepare(batch)

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
        """One kernel call."""
        store(self._pool, k, v, call, batch)
        if q.stride(-1) != 1:
            q = q.contiguous()
        out = q.new_empty((q.shape[0], call.num_heads, call.value_dim))
        args = self._args[call.call_id]
        args.q, args.out = q.data_ptr(), out.data_ptr()
        args.q_stride, args.head_stride = q.stride(0), q.stride(1)
        args.q_bf16 = q.dtype == torch.bfloat16
        args.batch = q.shape[0]
        args.rows, args.lens = batch.req_pool_indices.data_ptr(), batch.seq_lens.data_ptr()
        if sinks is not None:
            sinks = sinks.float()
            args.sinks = sinks.data_ptr()
        if self._kernel(ctypes.byref(args)):
            raise ContractError(
                f"{call.module} is larger than the native kernel's buffers, which supports() "
                "should have said. Choose --attention sdpa, and report it"
            )
        return out

    def _fixed_args(self, call: AttentionCallSpec) -> _DecodeArgs:
        keys, values = self._pool.key(call.cache_id), self._pool.value(call.cache_id)
        return _DecodeArgs(
            k=keys.data_ptr(),
            v=values.data_ptr(),
            table=self._req_to_token.data_ptr(),
            table_stride=self._req_to_token.stride(0),
            heads=call.num_heads,
            kv_heads=call.num_kv_heads,
            dim=call.head_dim,
            value_dim=call.value_dim,
            v_width=values.stride(-2),
            window=call.window or 0,
            chunk=call.chunk or 0,
            scale=call.scale,
            softcap=call.softcap or 0.0,
            kv_bf16=keys.dtype == torch.bfloat16,
        )


def _counts(batch: ForwardBatch) -> list[int]:
    extend = batch.extend
    counts: list[int] = (
        [1] * batch.batch_size if extend is None else extend.seq_lens_cpu.tolist()
    )
    return counts


def _similar(lengths: Tensor) -> list[Tensor]:
    """Rows grouped so that padding stays below ``_WASTE``; one group if that is good enough."""
    total, longest, size = int(lengths.sum()), int(lengths.max()), len(lengths)
    if longest * size <= _WASTE * total:
        return [torch.arange(size)]
    order = torch.argsort(lengths.long())
    groups, begin = [], 0
    ordered = lengths[order].tolist()
    for end in range(1, size + 1):
        if end == size or ordered[end] > _WASTE * max(ordered[begin], 32):
            groups.append(order[begin:end])
            begin = end
    # One group is the batch as it is: its rows stay in their order.
    return groups if len(groups) > 1 else [torch.arange(size)]


def _decode_mask(group: _Group, call: AttentionCallSpec) -> Tensor:
    """``[b, 1, 1, L]`` additive mask of one group."""
    keys = torch.arange(group.slots.shape[1])[None]
    query = group.query_pos[:, None]
    seen = keys <= query
    if call.window is not None:
        seen &= keys > query - call.window
    if call.chunk is not None:
        seen &= keys // call.chunk == query // call.chunk
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[:, None, None]
