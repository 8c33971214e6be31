# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803, SIM102 - constants are capitals; an `if` of a constant stands alone
"""Attention of one new token a request over the paged cache, in two kernels.

The first divides the visible keys of each request into S splits and attends to each; the query
heads of one key head are rows of one matrix product, so keys are read once.  The second merges
the splits; with S = 1 there is none.  Lengths are read on the device only, so a recorded graph
replays with other lengths.  Called by the attention providers of backends.

Shapes: B requests, H query heads, K key/value heads, G = H / K, D key size, Dv value size,
S splits, R rows and C columns of the table of slots.
"""

from __future__ import annotations

__all__ = ["DecodeMeta", "choose_splits", "decode_attention", "meta"]

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from bedplate.errors import UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)

_MAX_SPLITS = 64
_TOKENS_A_SPLIT = 128
"""Fewer make the merge cost more than the split wins."""
_PROGRAMS_A_CORE = 4
_MAX_KEY, _MAX_VALUE = 576, 512
_MERGE_COLUMNS = 128
_TILES = ((512, 64, 4, 3), (1024, 32, 4, 3), (2560, 32, 8, 3), (1 << 30, 16, 8, 2))
"""Bytes of key and value of a token and head, up to which: keys a tile, warps, stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeMeta:
    """Sizes with which the split kernel is compiled.

    Attributes:
        BLOCK_N: Keys a tile.
        BLOCK_D: Power of two, the first columns of a key.
        BLOCK_R: Power of two that holds the other columns; 0 if there are none.
        BLOCK_V: Power of two that holds Dv.
        num_warps: Warps a program.
        num_stages: Tiles in flight.
    """

    BLOCK_N: int
    BLOCK_D: int
    BLOCK_R: int
    BLOCK_V: int
    num_warps: int
    num_stages: int


def meta(head_dim: int, value_dim: int, dtype: torch.dtype) -> DecodeMeta:
    """Choose the sizes for D and Dv; ``dtype`` is that of the cache.

    A key of 576 is a product over 512 columns and one over 64, one of 80 is 64 and 16.

    Raises:
        UnsupportedError: D or Dv is too large.
    """
    if head_dim > _MAX_KEY or value_dim > _MAX_VALUE:
        raise UnsupportedError(
            f"decode attention in Triton takes keys up to {_MAX_KEY} and values up to "
            f"{_MAX_VALUE}, not {head_dim} and {value_dim}; choose another attention"
        )
    main = max(16, min(512, 1 << (head_dim.bit_length() - 1)))
    rest = head_dim - main
    size = (head_dim + value_dim) * dtype.itemsize
    tile, warps, stages = next(choice for bound, *choice in _TILES if size <= bound)
    return DecodeMeta(
        BLOCK_N=tile,
        BLOCK_D=main,
        BLOCK_R=max(16, _power_of_two(rest)) if rest > 0 else 0,
        BLOCK_V=max(16, _power_of_two(value_dim)),
        num_warps=warps,
        num_stages=stages,
    )


def choose_splits(batch_size: int, num_kv_heads: int, max_context_len: int, cores: int) -> int:
    """S, a power of two up to 64: enough programs to fill the cores, no tiny splits.

    Args:
        batch_size: B, as captured.
        num_kv_heads: K.
        max_context_len: Longest context worth a split; actual lengths may be shorter.
        cores: Multiprocessors of the device.
    """
    wanted = _PROGRAMS_A_CORE * cores // max(1, batch_size * num_kv_heads)
    useful = max_context_len // _TOKENS_A_SPLIT
    return 1 << max(1, min(wanted, useful, _MAX_SPLITS)).bit_length() - 1


def decode_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    req_to_token: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    partial: Tensor,
    lse: Tensor,
    *,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """Attend from the last token of each request; semantics of ``reference.attention``.

    Neither allocates nor synchronises, and reads no length on the host.  All tensors are on
    one device; the last dimension of each has stride 1.

    Args:
        q: ``[B, H, D]``, other strides are free.
        k_pool: ``[slots, K, D]``.
        v_pool: ``[slots, K, Dv]``; for latent attention the first columns of ``k_pool``.
        req_to_token: ``[R, C]`` int32, the slot of each token.
        rows: ``[B]`` int32, the row of each request in ``req_to_token``.
        seq_lens: ``[B]`` int32, the new token included; 0 makes zeros.
        out: ``[B, H, Dv]``, written; other strides are free.
        partial: ``[B, H, S, Dv]`` float32 contiguous workspace; not touched when S is 1.
        lse: ``[B, H, S]`` float32 contiguous workspace, in base 2; its S is the number of
            splits, a power of two.
        scale: Multiplier of the scores.
        window: Only the last ``window`` tokens are visible; 0 means all.
        chunk: Only tokens of the last token's chunk are visible; 0 means all.
        softcap: Scores become ``softcap · tanh(scores / softcap)``; 0 means not.
        sinks: ``[H]`` logits that join the softmax and are dropped.

    Raises:
        UnsupportedError: D or Dv is too large.
    """
    batch, heads, head_dim = q.shape
    kv_heads, value_dim, splits = k_pool.shape[1], v_pool.shape[2], lse.shape[2]
    sizes = meta(head_dim, value_dim, k_pool.dtype)
    group = heads // kv_heads
    block = 16 if group <= 16 else 32
    _split_kernel[(batch, kv_heads * triton.cdiv(group, block), splits)](
        q, k_pool, v_pool, req_to_token, rows, seq_lens, sinks, out, partial, lse,
        scale,
        q.stride(0), q.stride(1), k_pool.stride(0), k_pool.stride(1),
        v_pool.stride(0), v_pool.stride(1), req_to_token.stride(0),
        out.stride(0), out.stride(1),
        H=heads, G=group, D=head_dim, DV=value_dim,
        WINDOW=window, CHUNK=chunk, SOFTCAP=softcap,
        SPLIT=splits > 1, LATENT=_is_latent(k_pool, v_pool, sizes), BLOCK_G=block,
        BLOCK_N=sizes.BLOCK_N, BLOCK_D=sizes.BLOCK_D, BLOCK_R=sizes.BLOCK_R,
        BLOCK_V=sizes.BLOCK_V, num_warps=sizes.num_warps, num_stages=sizes.num_stages,
    )  # fmt: skip
    if splits > 1:
        columns = min(sizes.BLOCK_V, _MERGE_COLUMNS)
        _merge_kernel[(batch, heads, triton.cdiv(value_dim, columns))](
            partial, lse, out, out.stride(0), out.stride(1),
            H=heads, DV=value_dim, S=splits, BLOCK_V=columns, num_warps=4,
        )  # fmt: skip


@triton.jit
def _split_kernel(
    q, keys, values, table, rows, lengths, sinks, out, partial, lse,
    scale,
    q_b, q_h, k_t, k_h, v_t, v_h, table_r, out_b, out_h,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr, LATENT: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Attend to the keys of one request, one key head's queries and one split."""
    request = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    kv_head = tl.program_id(1) // blocks
    member = tl.program_id(1) % blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    head = kv_head * G + member
    real = member < G
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    place = (request * H + head) * splits + split

    length = tl.load(lengths + request)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(first, length - WINDOW)
    if CHUNK > 0:
        first = tl.maximum(first, (length - 1) // CHUNK * CHUNK)
    share = tl.cdiv(tl.cdiv(length - first, BLOCK_N), splits) * BLOCK_N
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    if SPLIT:
        if begin >= end:  # the merge takes no part whose lse says that it is empty
            tl.store(lse + place, tl.full([BLOCK_G], float("-inf"), tl.float32), mask=real)
            return

    column = tl.arange(0, BLOCK_D)
    query = q + request * q_b + head[:, None] * q_h
    q_main = tl.load(
        query + column[None, :], mask=real[:, None] & (column < D)[None, :], other=0.0
    )
    if BLOCK_R > 0:
        rest = BLOCK_D + tl.arange(0, BLOCK_R)
        q_rest = tl.load(
            query + rest[None, :], mask=real[:, None] & (rest < D)[None, :], other=0.0
        )
    value_column = tl.arange(0, BLOCK_V)

    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    if sinks is not None:
        if split == 0:  # a sink is one more key of the first split, whose value is zero
            peak = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
            total += 1.0
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    slots = table + tl.load(rows + request).to(tl.int64) * table_r
    for start in tl.range(begin, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        live = token < end
        slot = tl.load(slots + token, mask=live, other=0).to(tl.int64)
        key = keys + slot[:, None] * k_t + kv_head * k_h
        k_main = tl.load(
            key + column[None, :], mask=live[:, None] & (column < D)[None, :], other=0.0
        ).to(q_main.dtype)
        scores = tl.dot(q_main, tl.trans(k_main), input_precision="ieee")
        if BLOCK_R > 0:
            k_rest = tl.load(
                key + rest[None, :], mask=live[:, None] & (rest < D)[None, :], other=0.0
            ).to(q_main.dtype)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
        if SOFTCAP > 0:  # tanh x = 1 - 2 / (1 + e^2x)
            bent = tl.exp2(scores * (scale * 2 * LOG2E / SOFTCAP))
            scores = (SOFTCAP * LOG2E) * (1 - 2 / (1 + bent))
        else:
            scores = scores * (scale * LOG2E)
        scores = tl.where(live[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weight = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(weight, 1)
        if LATENT:
            v = k_main
        else:
            v = tl.load(
                values + slot[:, None] * v_t + kv_head * v_h + value_column[None, :],
                mask=live[:, None] & (value_column < DV)[None, :],
                other=0.0,
            ).to(q_main.dtype)  # masked, as 0 · NaN is NaN
        acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        peak = higher

    acc = acc / tl.where(total > 0, total, 1)[:, None]
    written = real[:, None] & (value_column < DV)[None, :]
    if SPLIT:
        tl.store(lse + place, peak + tl.log2(total), mask=real)
        tl.store(partial + place[:, None] * DV + value_column[None, :], acc, mask=written)
    else:
        target = out + request * out_b + head[:, None] * out_h + value_column[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=written)


@triton.jit
def _merge_kernel(
    partial, lse, out, out_b, out_h,
    H: tl.constexpr, DV: tl.constexpr, S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Weigh the splits of some columns of one request and head by their sums."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    place = (request * H + head) * S + tl.arange(0, S)
    sums = tl.load(lse + place)
    peak = tl.max(sums, 0)
    weight = tl.exp2(sums - tl.where(peak > float("-inf"), peak, 0.0))
    parts = tl.load(
        partial + place[:, None] * DV + column[None, :],
        mask=(sums > float("-inf"))[:, None] & (column < DV)[None, :],
        other=0.0,
    )
    total = tl.sum(weight, 0)
    merged = tl.sum(weight[:, None] * parts, 0) / tl.where(total > 0, total, 1.0)
    target = out + request * out_b + head * out_h + column
    tl.store(target, merged.to(out.dtype.element_ty), mask=column < DV)


def _is_latent(k_pool: Tensor, v_pool: Tensor, sizes: DecodeMeta) -> bool:
    """Whether the values are the columns of the keys that a tile holds anyway."""
    return (
        k_pool.data_ptr() == v_pool.data_ptr()
        and k_pool.stride() == v_pool.stride()
        and sizes.BLOCK_V == sizes.BLOCK_D
    )


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
