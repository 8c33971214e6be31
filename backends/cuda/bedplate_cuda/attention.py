# SPDX-License-Identifier: Apache-2.0
"""Attention over the paged cache by Triton kernels, recordable in decode.

The kernels and their workspaces are neutral and live in ``bedplate_triton``; here is the
choice between them and torch's own attention for fresh prompts.

Shapes: T new tokens, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

__all__ = ["TritonAttention", "provider"]

from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bedplate.contract import (
    AttentionBuild,
    AttentionCallSpec,
    AttentionProvider,
    AttentionRequest,
    Support,
)
from bedplate_cuda.ops import device_features
from bedplate_cuda.runtime import NARROW
from bedplate_triton.attention import PagedAttention, supports

if TYPE_CHECKING:
    from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
    from bedplate_triton.features import Features

_LONG_PROMPT = 2048
"""Whole prompts from so many tokens on go to cuDNN's attention, which is 1.7 times as fast at
4,096 and not faster at 1,024 (docs/reference/measurements.md)."""
_PLANNED_TOKENS = 256
"""cuDNN makes a plan for every length, which takes as long as a prompt; so lengths are padded
to multiples of this."""


class TritonAttention(PagedAttention):
    """The kernels' attention, and cuDNN's for whole prompts that are long.

    Args:
        build: Pools, table and limits.
        features: The device; the current one when not given.
    """

    def __init__(self, build: AttentionBuild, *, features: Features | None = None) -> None:
        super().__init__(build, features or device_features())
        self._prompts: list[slice] = []
        # Of a cache of eight bits every token reads the same, in whole prompts and in chunks.
        stored_whole = build.kv_pool.dtype == build.dtype and not build.deterministic
        device = build.req_to_token.device
        self._planned = {
            call.call_id
            for call in build.calls
            if stored_whole and _planned_serves(call, build.dtype, device)
        }
        # Else rows of padding would hold anything behind a call that leaves them out.
        self._may_pad = len(self._planned) == len(build.calls)

    def prepare(self, batch: ForwardBatch) -> None:
        """Host integers of a pass with several new tokens; decode needs none."""
        super().prepare(batch)
        if batch.extend is not None:
            self._prompts = []
            if _are_fresh(batch.extend):
                counts = batch.extend.seq_lens_cpu.tolist()
                self._prompts = _slices(counts, batch.num_tokens)

    def padded_tokens(self, batch: ForwardBatch) -> int:
        """So many that the last prompt has a length that cuDNN has a plan for."""
        if not self._may_pad or batch.extend is None or not _are_fresh(batch.extend):
            return batch.num_tokens
        return batch.num_tokens + -int(batch.extend.seq_lens_cpu[-1]) % _PLANNED_TOKENS

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
        planned = self._prompts and call.call_id in self._planned
        if not planned or k is None or v is None:
            return super().forward_extend(q, k, v, call, batch, sinks=sinks)
        self.store(k, v, call, batch)
        if len(self._prompts) == 1:
            return _attend_fresh(q, k, v, call.scale)
        out = q.new_empty((q.shape[0], call.num_heads, call.value_dim))
        for rows in self._prompts:
            out[rows] = _attend_fresh(q[rows], k[rows], v[rows], call.scale)
        return out


def _supports(request: AttentionRequest) -> Support:
    answer = supports(request, NARROW)
    if not answer:
        return answer
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    planned = _planned_serves(request.calls[0], getattr(torch, request.dtype), device)
    prompts = (
        f"prompts from {_LONG_PROMPT:,} tokens by cuDNN"
        if planned
        else f"prompts too, as {planned.reason}"
    )
    return Support.yes(f"{answer.reason}; {prompts}")


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
    q, k, v = map(_padded, (q, k, v))
    out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        None, False, 0.0, True, False, scale=scale,
    )[0]  # fmt: skip
    return out[0].transpose(0, 1)[:count]


def _padded(heads: Tensor) -> Tensor:
    """The rows with zeros behind them, up to a length that has a plan."""
    count = len(heads)
    padding = -count % _PLANNED_TOKENS
    if not padding:
        return heads
    out = heads.new_empty((count + padding, *heads.shape[1:]))
    out[:count] = heads
    out[count:] = 0  # nobody's key, but what is no number would spread
    return out


def _are_fresh(extend: ExtendPart) -> bool:
    """Whether a pass has nothing but whole prompts, all of them long."""
    shortest = int(extend.seq_lens_cpu.min())
    return shortest >= _LONG_PROMPT and not extend.prefix_lens_cpu.any()


def _slices(counts: list[int], rows: int) -> list[slice]:
    """Rows of each request in the packed tokens; what pads the pass is the last one's."""
    ends = [*accumulate(counts[:-1]), rows]
    return [slice(begin, end) for begin, end in pairwise([0, *ends])]


provider = AttentionProvider(
    name="triton",
    provider="cuda",
    priority=100,
    supports=_supports,
    build=TritonAttention,
    determinism="batch_invariant",
)
"""What this backend offers."""
