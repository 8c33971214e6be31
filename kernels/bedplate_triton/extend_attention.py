# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803, SIM108 - constants are capitals; branches of a constant are no ternary
"""Attention of several new tokens per request over a paged cache: prefill, chunks, mixtures.

The new keys and values are in the pool already, so one kernel serves fresh prompts, prompts
with a cached prefix and batches of both: everything is read through ``req_to_token``.  It is
apart from decode attention because here the arithmetic and not the memory is the limit: a
program holds many query rows, packed as (token, head of the group), so that a key is read
once for all query heads that share it.  Attention backends call it, once per layer.

Shapes: T new tokens of all requests, B requests, H query heads, K key/value heads,
G = H / K, D head size, Dv value size, R rows of C slots.
"""

from __future__ import annotations

__all__ = ["extend_attention", "supports"]

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from bedplate.contract.decisions import Support
from bedplate_triton import configs
from bedplate_triton.decode_attention import LOG2E, load_slots
from bedplate_triton.sizes import cdiv, column_blocks, power_of_two

if TYPE_CHECKING:
    from bedplate_triton.features import Features

_LN2 = tl.constexpr(0.6931471805599453)
_LIMITS = {
    torch.bfloat16: (576, 512),
    torch.float16: (576, 512),
    torch.float32: (256, 256),
}
"""Largest D and Dv by dtype."""


def supports(head_dim: int, value_dim: int, dtype: torch.dtype) -> Support:
    """Whether a program can hold tiles of these sizes."""
    limits = _LIMITS.get(dtype)
    if limits is None:
        return Support.no(f"the kernel multiplies {', '.join(map(str, _LIMITS))}, not {dtype}")
    if head_dim > limits[0] or value_dim > limits[1]:
        sizes, most = f"{head_dim} and {value_dim}", f"{limits[0]} and {limits[1]}"
        return Support.no(f"keys and values of {sizes} exceed {most}, the most in {dtype}")
    return Support.yes()


def extend_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    req_to_token: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    start_loc: Tensor,
    extend_lens: Tensor,
    out: Tensor,
    lse: Tensor | None = None,
    *,
    features: Features,
    max_extend_len: int,
    scale: float,
    causal: bool = True,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    invariant: bool = False,
) -> None:
    """Attend the last ``extend_lens[b]`` tokens of every request to all its visible tokens.

    Query i of request b stands at position ``seq_lens[b] − extend_lens[b] + i``.  Requests
    with ``extend_lens`` 0 write nothing.  All tensors are on the device and the caller's;
    nothing is allocated and nothing read on the host.

    Args:
        q: ``[T, H, D]`` with any strides, the last one 1.
        k_pool: ``[slots, K, D]``, last stride 1; another dtype is converted to that of ``q``.
        v_pool: ``[slots, K, Dv]``, likewise; may be a view of ``k_pool``.
        req_to_token: ``[R, C]`` int32; slot of every token, last stride 1.
        rows: ``[B]`` int32; row of ``req_to_token`` of each request.
        seq_lens: ``[B]`` int32; tokens with the new ones.
        start_loc: ``[B]`` int32; first row of each request in ``q`` and ``out``.
        extend_lens: ``[B]`` int32; new tokens.
        out: ``[T, H, Dv]``, written; last stride 1.
        lse: ``[T, H]`` float32 contiguous; gets the natural log of the sum of exponentials of
            the scores, a sink's included.
        features: The device.
        max_extend_len: At least the largest of ``extend_lens``; sizes the grid.
        scale: Multiplier of the scores.
        causal: Whether later keys are hidden.
        window: A query at p sees keys at positions > p − window; 0 = all.
        chunk: A query sees keys of its own ``position // chunk`` only; 0 = all.
        softcap: Scores become ``softcap · tanh(scores / softcap)``; 0 = they stay.
        sinks: ``[H]`` logits that join the softmax and are dropped, or ``None``.
        k_scale: What a stored key is multiplied by.
        v_scale: What a stored value is multiplied by.
        invariant: Whether a token's result has the same bits however many tokens are new,
            whatever the other requests and ``max_extend_len``; slower.
    """
    (_, heads, head_dim), (_, kv_heads, value_dim) = q.shape, v_pool.shape
    group = heads // kv_heads
    key = {"head_dim": head_dim, "value_dim": value_dim, "group": group}
    key |= {"bytes": q.element_size(), "invariant": invariant}
    if not invariant:  # packed rows of the longest extension, as a class
        key["rows"] = power_of_two(max(1, max_extend_len * group))
    choice = configs.choose("extend_attention", features, **key)
    tiles = cdiv(max_extend_len * group, choice["BLOCK_M"])
    requests = rows.shape[0]
    if not tiles or not requests:
        return
    # Requests of several tiles lie side by side in the grid's first dimension: a second one
    # would have as many tiles for each of them as the longest needs.
    together = invariant or (requests > 1 and tiles > 1)
    grid = (tiles * kv_heads, requests)
    if together:
        most = q.shape[0] * group // choice["BLOCK_M"] + requests
        grid = (min(most, tiles * requests) * kv_heads, 1)
    main, tail = column_blocks(head_dim)
    shared = v_pool.data_ptr() == k_pool.data_ptr() and v_pool.stride() == k_pool.stride()
    _extend_kernel[grid](
        q, k_pool, v_pool, req_to_token, rows, seq_lens, start_loc, extend_lens, out, lse,
        sinks, scale * k_scale, v_scale, requests, *q.stride()[:2], req_to_token.stride(0),
        *out.stride()[:2],
        K_T=k_pool.stride(0), K_H=k_pool.stride(1), V_T=v_pool.stride(0), V_H=v_pool.stride(1),
        KV_HEADS=kv_heads, GROUP=group, D=head_dim, DV=value_dim, D_MAIN=main, D_TAIL=tail,
        DV_PAD=max(16, power_of_two(value_dim)), CAUSAL=causal, WINDOW=window,
        CHUNK=chunk, SOFTCAP=softcap, VALUE_IN_KEY=shared and value_dim == main,
        TOGETHER=together, INVARIANT=invariant, enable_fp_fusion=not invariant,
        BLOCK_M=choice["BLOCK_M"], BLOCK_N=choice["BLOCK_N"], num_warps=choice["num_warps"],
        num_stages=choice["num_stages"], **choice["options"], **features.chain.arguments(),
    )  # fmt: skip


@triton.jit
def _first_key(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first key that a query at ``position`` sees."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(first, position - WINDOW + 1)
    if CHUNK > 0:
        first = tl.maximum(first, position // CHUNK * CHUNK)
    return first


@triton.jit
def _end_key(position, length, CAUSAL: tl.constexpr, CHUNK: tl.constexpr):
    """One past the last key that a query at ``position`` sees."""
    if CAUSAL:
        end = position + 1
    else:
        end = position * 0 + length
        if CHUNK > 0:
            end = tl.minimum(end, (position // CHUNK + 1) * CHUNK)
    return end


@triton.jit
def _load(
    pool, slots, columns, inside, STRIDE: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr
):
    """Rows of a pool ``[BLOCK_N, columns]``; zero where there is no key or no column."""
    where = pool + slots[:, None].to(tl.int64) * STRIDE + columns[None, :]
    if columns.shape[0] > SIZE:
        if MASKED:
            return tl.load(where, mask=inside[:, None] & (columns < SIZE)[None, :], other=0.0)
        return tl.load(where, mask=(columns < SIZE)[None, :], other=0.0)
    if MASKED:
        return tl.load(where, mask=inside[:, None], other=0.0)
    return tl.load(where)


@triton.jit
def _sweep(
    acc, total, peak, start, stop, q, q_tail, table, k_pool, v_pool, scale, first, end,
    lowest, last_end,
    K_T: tl.constexpr, V_T: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr,
    DV_PAD: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr,
    VALUE_IN_KEY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys ``[start, stop)``; peak and scores are in base 2.

    Of these, the tile's rows see keys of ``[lowest, last_end)`` only.
    """
    lanes = tl.arange(0, BLOCK_N)
    main = tl.arange(0, D_MAIN)
    ahead = load_slots(table, start, stop, BLOCK_N)
    for at in tl.range(start, stop, BLOCK_N):
        keys = at + lanes
        inside = (keys >= lowest) & (keys < last_end)
        slots = ahead
        ahead = load_slots(table, at + BLOCK_N, stop, BLOCK_N)
        k = _load(k_pool, slots, main, inside, K_T, D, MASKED).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if D_TAIL > 0:
            tail = tl.arange(0, D_TAIL)
            rest = _load(k_pool + D_MAIN, slots, tail, inside, K_T, D - D_MAIN, MASKED)
            rest = rest.to(q.dtype)
            scores = tl.dot(q_tail, tl.trans(rest), scores, input_precision="ieee")
        if SOFTCAP > 0:
            # tanh by exp2, as tanh itself is a vendor's library function.
            doubled = tl.exp2(scores * (scale * (2 * LOG2E / SOFTCAP)))
            scores = (1 - 2 / (doubled + 1)) * (SOFTCAP * LOG2E)
        else:
            scores = scores * (scale * LOG2E)
        if MASKED:
            seen = (keys[None, :] >= first[:, None]) & (keys[None, :] < end[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        if MASKED:
            # A row that has seen no key yet: keep −inf − −inf away.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        else:
            base = new_peak
        probs = tl.exp2(scores - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(probs, 1)
        if VALUE_IN_KEY:
            v = k
        else:
            wide = tl.arange(0, DV_PAD)
            v = _load(v_pool, slots, wide, inside, V_T, DV, MASKED).to(q.dtype)
        acc = tl.dot(probs.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@triton.jit
def _find_request(extend_lens, requests, tile, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The request that ``tile`` of all requests' tiles belongs to, and its tile there.

    ``requests`` itself, if there are not so many tiles.
    """
    found = 0  # requests that end before the tile
    theirs = 0  # tiles of those
    total = 0  # tiles of all that were looked at
    lanes = tl.arange(0, 64)
    for first in tl.range(0, requests, 64):
        inside = first + lanes < requests
        counts = tl.load(extend_lens + first + lanes, mask=inside, other=0)
        tiles = tl.cdiv(counts * GROUP, BLOCK_M)
        passed = inside & (total + tl.cumsum(tiles, 0) <= tile)
        found += tl.sum(passed.to(tl.int32), 0)
        theirs += tl.sum(tl.where(passed, tiles, 0), 0)
        total += tl.sum(tiles, 0)
    return found, tile - theirs


# Where the numbers of a pass begin changes their alignment: specialised, that would compile
# anew.
@triton.jit(
    do_not_specialize=[
        "req_to_token", "rows", "seq_lens", "start_loc", "extend_lens", "requests",
    ]
)  # fmt: skip
def _extend_kernel(
    q, k_pool, v_pool, req_to_token, rows, seq_lens, start_loc, extend_lens, out, lse, sinks,
    scale, v_scale, requests, q_stride, q_head_stride, table_stride, out_stride,
    out_head_stride,
    K_T: tl.constexpr, K_H: tl.constexpr, V_T: tl.constexpr, V_H: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, DV_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr,
    VALUE_IN_KEY: tl.constexpr, TOGETHER: tl.constexpr, INVARIANT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WAIT: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """Program (tile · K + key/value head, request): ``BLOCK_M`` query rows of one head.

    ``TOGETHER`` has the tiles of all requests, one after the other, in the first dimension.
    """
    RELEASE()
    head = (tl.program_id(0) % KV_HEADS).to(tl.int64)  # a stride of heads may span the pool
    tile = tl.program_id(0) // KV_HEADS
    WAIT()
    if TOGETHER:
        request, tile = _find_request(extend_lens, requests, tile, GROUP, BLOCK_M)
        if request == requests:
            return
    else:
        request = tl.program_id(1)
    count = tl.load(extend_lens + request)
    length = tl.load(seq_lens + request)
    # The last rows see the most keys: they start first, so that the device ends evenly.
    tile = tl.cdiv(count * GROUP, BLOCK_M) - 1 - tile
    if tile < 0:
        return
    past = length - count
    row0 = tile * BLOCK_M
    row = row0 + tl.arange(0, BLOCK_M)
    token = tl.minimum(row // GROUP, count - 1)  # spare rows repeat the last token
    query_head = head * GROUP + row % GROUP
    packed = tl.load(start_loc + request).to(tl.int64) + token
    q_rows = q + packed * q_stride + query_head * q_head_stride
    main = tl.arange(0, D_MAIN)
    q_main = tl.load(q_rows[:, None] + main[None, :], mask=(main < D)[None, :], other=0.0)
    q_tail = q_main
    if D_TAIL > 0:
        tail = D_MAIN + tl.arange(0, D_TAIL)
        q_tail = tl.load(q_rows[:, None] + tail[None, :], mask=(tail < D)[None, :], other=0.0)

    early = past + row0 // GROUP
    late = past + tl.minimum((row0 + BLOCK_M - 1) // GROUP, count - 1)
    first = _first_key(past + token, WINDOW, CHUNK)
    end = _end_key(past + token, length, CAUSAL, CHUNK)
    start = _first_key(early, WINDOW, CHUNK)
    stop = _end_key(late, length, CAUSAL, CHUNK)
    # Whole blocks that every row sees need no mask: [free, free_end).
    edge = _first_key(late, WINDOW, CHUNK) - start
    free = tl.minimum(start + tl.cdiv(edge, BLOCK_N) * BLOCK_N, stop)
    spare = tl.maximum(_end_key(early, length, CAUSAL, CHUNK) - free, 0)
    free_end = free + spare // BLOCK_N * BLOCK_N

    table = req_to_token + tl.load(rows + request).to(tl.int64) * table_stride
    k_head = k_pool + head * K_H
    v_head = v_pool + head * V_H
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    if sinks is None:
        total = tl.zeros([BLOCK_M], tl.float32)
        peak = total - float("inf")
    else:
        total = tl.zeros([BLOCK_M], tl.float32) + 1
        peak = tl.load(sinks + query_head).to(tl.float32) * LOG2E
    if INVARIANT:
        # A row meets the same blocks in every pass, through one piece of code; a block of
        # which it sees nothing leaves its numbers as they are.
        acc, total, peak = _sweep(
            acc, total, peak, start // BLOCK_N * BLOCK_N, stop, q_main, q_tail, table, k_head,
            v_head, scale, first, end, start, stop, K_T, V_T, D, DV, D_MAIN, D_TAIL,
            DV_PAD, BLOCK_N, SOFTCAP, VALUE_IN_KEY, True,
        )  # fmt: skip
    else:
        bounds = (start, free, free_end, stop)
        for part in tl.static_range(3):
            if part > 0 or WINDOW + CHUNK > 0:  # without them, every row sees key 0
                acc, total, peak = _sweep(
                    acc, total, peak, bounds[part], bounds[part + 1], q_main, q_tail, table,
                    k_head, v_head, scale, first, end, start, stop, K_T, V_T, D, DV, D_MAIN,
                    D_TAIL, DV_PAD, BLOCK_N, SOFTCAP, VALUE_IN_KEY, part != 1,
                )  # fmt: skip
    columns = tl.arange(0, DV_PAD)
    real = row < count * GROUP
    where = out + packed * out_stride + query_head * out_head_stride
    some = tl.where(total > 0, total, 1.0)
    result = acc / some[:, None] * v_scale
    tl.store(
        where[:, None] + columns[None, :], result.to(out.dtype.element_ty),
        mask=real[:, None] & (columns < DV)[None, :],
    )  # fmt: skip
    if lse is not None:
        heads: tl.constexpr = KV_HEADS * GROUP
        sums = (peak + tl.log2(some)) * _LN2  # −∞ without keys, as the peak is
        tl.store(lse + packed * heads + query_head, sums, mask=real)
