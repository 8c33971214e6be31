# SPDX-License-Identifier: Apache-2.0
"""Fused-infer attention over the paged cache: one operator for every kind of pass.

Lengths are host integers there, also in graphs: they come from the batch's host mirror, and
``update_inputs`` gives what a replay has to renew.  Block tables are made on the device, so a
graph records them.

| pass | call |
|---|---|
| decode | BSH, one query token; with sinks, or a value size of its own, TND; latents BSND |
| prompts without cached tokens | TND over the fresh keys |
| everything else | TND over pages; sequence by sequence in BSND where the size has no TND |

Shapes: T new tokens, B requests, H query heads, K key/value heads, D key size, Dv value size,
W pages of the longest request.
"""

from __future__ import annotations

__all__ = ["FusedInferAttention", "make_provider"]

from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

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
from bedplate.errors import ContractError
from bedplate_npu import ops
from bedplate_npu.memory import NpuKVPool

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bedplate.batch.forward_batch import ForwardBatch

_CAUSAL, _BAND = 3, 4


@dataclass(slots=True)
class _Pass:
    """What one pass needs beside its tensors.

    Attributes:
        counts: New tokens of each request; empty ones have no row here.
        rows: Which requests those are; ``None`` = all.
        q_lens: Cumulative counts.
        kv_lens: Length of each request, new tokens included.
        fresh: Whether no request has cached tokens.
        table: ``[B, W]`` int32 pages of each request; device.
        hidden: Window → ``[B, 1, 1, W·PAGE_SIZE]`` bool, what one query token does not see.
    """

    counts: list[int]
    rows: list[int] | None
    q_lens: list[int]
    kv_lens: list[int]
    fresh: bool
    table: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)


class FusedInferAttention(AttentionBackend):
    """See the module.

    Args:
        build: Pools, table and limits.

    Attributes:
        update_keys: For each call in order, the keyword under which its lengths are renewed.

    Raises:
        ContractError: The pool is not this backend's.
    """

    def __init__(self, build: AttentionBuild) -> None:
        if not isinstance(build.kv_pool, NpuKVPool):
            raise ContractError(
                "fused-infer attention reads pages of NpuKVPool, not "
                f"{type(build.kv_pool).__name__}"
            )
        self._pool = build.kv_pool
        self._req_to_token = build.req_to_token
        self._windows = {call.window for call in build.calls if call.window is not None}
        self.update_keys = tuple(_length_key(call) for call in build.calls)
        device = build.req_to_token.device
        pages = -(-build.max_context_len // ops.PAGE_SIZE)
        self._room = pages * ops.PAGE_SIZE
        ones = torch.ones((ops.MASK_SIZE, ops.MASK_SIZE), dtype=torch.int8, device=device)
        self._causal = torch.triu(ones, diagonal=1)
        self._positions = torch.arange(self._room, dtype=torch.int32, device=device)
        self._pass: _Pass | None = None

    def prepare(self, batch: ForwardBatch) -> None:
        """Length lists from the host mirror; nothing waits for the device.

        Raises:
            ContractError: A request is longer than its row of pages.
        """
        lens = self._lengths(batch)
        if batch.extend is None:
            counts, fresh = [1] * len(lens), False
        else:
            counts = batch.extend.seq_lens_cpu.tolist()
            fresh = not batch.extend.prefix_lens_cpu.any()
        rows = None
        if not all(counts):
            rows = [row for row, count in enumerate(counts) if count]
            counts, lens = [counts[row] for row in rows], [lens[row] for row in rows]
        self._pass = _Pass(counts, rows, list(accumulate(counts)), lens, fresh)

    def prepare_in_graph(self, batch: ForwardBatch) -> None:
        """Pages of each request, and what windows hide in decode; recordable."""
        step = self._current()
        first = self._req_to_token[:, :: ops.PAGE_SIZE]
        table = first.index_select(0, batch.req_pool_indices)
        step.table = torch.div(table, ops.PAGE_SIZE, rounding_mode="floor").contiguous()
        if step.rows is not None:
            step.table = step.table[torch.tensor(step.rows, device=table.device)].contiguous()
        if batch.mode.is_decode():
            ends = batch.seq_lens[:, None]
            for window in self._windows:
                hidden = self._positions < ends - window
                step.hidden[window] = hidden[:, None, None].contiguous()

    def update_inputs(self, batch: ForwardBatch) -> list[dict[str, list[int]]]:
        """What each recorded call gets before a replay: its length list, under its own key.

        Operators ignore a key that they do not know, so the keys belong to the calls.
        """
        lens = self._lengths(batch)
        return [{key: lens} for key in self.update_keys]

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
        """Write, then one call for all requests."""
        self._store(k, v, call, batch)
        if call.value_in_key:
            return self._latent(q, call, "BSND")
        if _packed_decode(call):
            return self._packed(q, call, sinks)
        step = self._current()
        hidden = None if call.window is None else step.hidden[call.window]
        return self._single(q, call, step.kv_lens, step.table, hidden)

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
        """Write, then one call for all requests, or one each where nothing else serves."""
        self._store(k, v, call, batch)
        if call.value_in_key:
            return self._latent(q, call, "TND")
        if (call.head_dim, call.value_dim) not in ops.TND_SIZES:
            return self._one_by_one(q, call)
        if self._current().fresh and k is not None and v is not None:
            return self._packed(q, call, sinks, k.contiguous(), v.contiguous())
        return self._packed(q, call, sinks)

    def _packed(
        self,
        q: Tensor,
        call: AttentionCallSpec,
        sinks: Tensor | None,
        keys: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """``[T, H, Dv]`` by one TND call, over fresh keys where given, else over pages."""
        step = self._current()
        fresh = keys is not None and values is not None
        if keys is None or values is None:
            keys, values = self._pool.pages(call.cache_id)
        return ops.fused_infer_attention(
            q.contiguous(), keys, values, layout="TND", q_lens=step.q_lens,
            kv_lens=step.q_lens if fresh else step.kv_lens,
            block_table=None if fresh else step.table, mask=self._causal,
            sinks=sinks, **_sparse(call), **_numbers(call),
        )  # fmt: skip

    def _single(
        self,
        q: Tensor,
        call: AttentionCallSpec,
        kv_lens: list[int],
        table: Tensor | None,
        hidden: Tensor | None,
    ) -> Tensor:
        """``[B, H, D]`` of one query token a request; sparse modes, so windows, are ignored."""
        keys, values = self._pool.pages(call.cache_id)
        out = ops.fused_infer_attention(
            q.contiguous().view(q.shape[0], 1, -1), keys, values, layout="BSH",
            kv_lens=kv_lens, block_table=table, mask=hidden, **_numbers(call),
        )  # fmt: skip
        return out.view(q.shape[0], call.num_heads, call.value_dim)

    def _one_by_one(self, q: Tensor, call: AttentionCallSpec) -> Tensor:
        """``[T, H, D]`` for sizes without a packed form: each sequence as a batch of one."""
        step, begin, parts = self._current(), 0, []
        assert step.table is not None  # prepare_in_graph comes before every pass
        keys, values = self._pool.pages(call.cache_id)
        for row, (count, length) in enumerate(zip(step.counts, step.kv_lens, strict=True)):
            own, pages = q[begin : begin + count].contiguous(), step.table[row : row + 1]
            begin += count
            if count == 1:
                hidden = self._hidden(length, call)
                parts.append(self._single(own, call, [length], pages, hidden))
                continue
            out = ops.fused_infer_attention(
                own[None], keys, values, layout="BSND", kv_lens=[length], block_table=pages,
                mask=self._causal, **_sparse(call), **_numbers(call),
            )  # fmt: skip
            parts.append(out[0])
        return torch.cat(parts)

    def _hidden(self, length: int, call: AttentionCallSpec) -> Tensor | None:
        """``[1, 1, 1, W·PAGE_SIZE]`` of what the last of ``length`` tokens does not see."""
        if call.window is None:
            return None
        return (self._positions < length - call.window).view(1, 1, 1, -1)

    def _latent(self, q: Tensor, call: AttentionCallSpec, layout: str) -> Tensor:
        """``[T, H, Dv]`` of latents; heads are padded to a power of two."""
        step = self._current()
        heads = 1 << (call.num_heads - 1).bit_length()
        if heads != call.num_heads:
            q = torch.nn.functional.pad(q, (0, 0, 0, heads - call.num_heads))
        latent, rope = (
            q[..., : call.value_dim].contiguous(), q[..., call.value_dim :].contiguous()
        )  # fmt: skip
        keys, rope_keys = self._pool.pages(call.cache_id)
        options: dict[str, Any] = {"num_heads": heads, "num_kv_heads": 1, "scale": call.scale}
        if layout == "TND":
            options |= {"q_lens": step.q_lens, "mask": self._causal, "sparse_mode": _CAUSAL}
        else:
            latent, rope = latent[:, None], rope[:, None]
        out = ops.fused_infer_attention(
            latent, keys, keys, layout=layout, kv_lens=step.kv_lens, block_table=step.table,
            query_rope=rope, key_rope=rope_keys, **options,
        )  # fmt: skip
        return out.view(q.shape[0], heads, call.value_dim)[:, : call.num_heads]

    def _store(
        self, k: Tensor | None, v: Tensor | None, call: AttentionCallSpec, batch: ForwardBatch
    ) -> None:
        if k is not None and call.alias_of is None:
            self._pool.write(call.call_id, batch.out_cache_loc, k, v)

    def _lengths(self, batch: ForwardBatch) -> list[int]:
        lens: list[int] = batch.seq_lens_cpu.tolist()
        if max(lens) > self._room:
            raise ContractError(
                f"a request has {max(lens)} tokens, but its row of pages holds {self._room}; "
                "raise --max-context-len"
            )
        return lens

    def _current(self) -> _Pass:
        if self._pass is None:
            raise ContractError("attention was called before prepare")
        return self._pass


def _packed_decode(call: AttentionCallSpec) -> bool:
    """Whether decode is packed: one query token has neither sinks nor sizes that differ."""
    return call.sinks or call.head_dim != call.value_dim


def _length_key(call: AttentionCallSpec) -> str:
    return "actual_seq_kvlen" if call.sinks else "actual_seq_lengths_kv"


def _numbers(call: AttentionCallSpec) -> dict[str, Any]:
    return {
        "num_heads": call.num_heads,
        "num_kv_heads": call.num_kv_heads,
        "scale": call.scale,
    }


def _sparse(call: AttentionCallSpec) -> dict[str, Any]:
    if call.window is None:
        return {"sparse_mode": _CAUSAL}
    return {"sparse_mode": _BAND, "window": call.window}


def make_provider(off: Mapping[str, str]) -> AttentionProvider:
    """What this backend offers.

    Args:
        off: Feature → why the self-test switched it off.
    """
    return AttentionProvider(
        name="fused_infer",
        provider="npu",
        priority=100,
        supports=partial(_supports, off=off),
        build=FusedInferAttention,
    )


def _supports(request: AttentionRequest, off: Mapping[str, str]) -> Support:
    if request.dtype not in ("float16", "bfloat16") or request.kv_dtype != request.dtype:
        return Support.no(
            f"reads float16 and bfloat16 with keys of the same, not {request.dtype} with "
            f"{request.kv_dtype}; choose --dtype bfloat16"
        )
    if request.page_size != ops.PAGE_SIZE:
        return Support.no(f"reads pages of {ops.PAGE_SIZE} tokens, not {request.page_size}")
    for call in request.calls:
        reason = _call_problem(call) or off.get(_feature(call), "") or off.get("attention", "")
        if reason:
            return Support.no(f"{call.module}: {reason}")
    return Support.yes("one operator for every pass, in graphs too")


def _call_problem(call: AttentionCallSpec) -> str:
    """Why one call cannot be served; empty if it can."""
    sizes = (call.head_dim, call.value_dim)
    if not call.causal or call.chunk is not None or call.softcap is not None:
        return "the operator has neither later tokens, chunks nor soft caps"
    if call.num_heads > 256 or call.num_heads // call.num_kv_heads > 64:
        return f"{call.num_heads} heads over {call.num_kv_heads}"
    if call.value_in_key:
        if sizes != (576, 512) or call.num_kv_heads != 1 or call.num_heads > 128:
            return f"latents of {sizes[1]} and {sizes[0] - sizes[1]}; 512 and 64 it must be"
        return ""
    if call.sinks:
        if not ops.has("npu_fused_infer_attention_score_v2"):
            return "this torch_npu has no operator with sinks"
        if sizes not in ops.TND_SIZES:
            return f"sinks with heads of {sizes[0]} have no form"
        return ""
    if sizes[0] != sizes[1] and sizes not in ops.TND_SIZES:
        return f"keys of {sizes[0]} and values of {sizes[1]} have no form"
    if call.head_dim > 512 or call.head_dim % 16:
        return f"heads of {call.head_dim}; at most 512 and a multiple of 16"
    return ""


def _feature(call: AttentionCallSpec) -> str:
    """What the self-test calls it."""
    if call.value_in_key:
        return "latents"
    if call.sinks:
        return "sinks"
    return "attention" if call.window is None else "windows"
