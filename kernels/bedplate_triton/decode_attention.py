# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803, SIM102 - constants are capitals; an `if` of a constant stands alone
"""Attention of one new token a request over the paged cache, in splits that are merged.

The visible keys of each request are divided into splits, one program each; the query heads of
one key head are rows of one matrix product, so keys are read once.  The limit is memory, so
what counts is how much of it is asked for at a time: the slots of a tile are read one tile
ahead, and so the pipeline of keys and values does not wait for the table.  Splits are merged
by a second kernel or by the last program of a request to finish; a request whose keys fill one
split needs no merge.  Lengths are read on the device only, so a recorded graph replays with
other lengths.  Called by the attention providers of backends.

Shapes: B requests, H query heads, K key/value heads, G = H / K, D key size, Dv value size,
S splits, R rows and C columns of the table of slots.
"""

from __future__ import annotations

__all__ = ["choose_splits", "decode_attention", "load_slots"]

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from bedplate.errors import ContractError, UnsupportedError
from bedplate_triton import configs
from bedplate_triton.sizes import cdiv, column_blocks, power_of_two

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from bedplate_triton.features import Features

LOG2E = tl.constexpr(1.4426950408889634)

_MAX_KEY, _MAX_VALUE = 576, 512
_MERGES = ("kernel", "last")


def choose_splits(
    features: Features,
    *,
    batch_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    kv_dtype: torch.dtype,
    max_context_len: int,
) -> int:
    """S: enough programs to fill the cores, no tiny splits.

    Args:
        features: The device.
        batch_size: B, as captured.
        num_heads: H.
        num_kv_heads: K.
        head_dim: D.
        value_dim: Dv.
        kv_dtype: Of the cache.
        max_context_len: Longest context worth a split; actual lengths may be shorter.
    """
    group = num_heads // num_kv_heads
    choice = _choose(features, batch_size, group, head_dim, value_dim, kv_dtype)
    programs = batch_size * num_kv_heads * cdiv(group, choice["BLOCK_G"])
    wanted = choice["programs_a_core"] * features.cores // max(1, programs)
    useful = max_context_len // choice["tokens_a_split"]
    return int(max(1, min(wanted, useful, choice["most_splits"])))


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
    features: Features,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    counters: Tensor | None = None,
) -> None:
    """Attend from the last token of each request; semantics of ``reference.attention``.

    Neither allocates nor synchronises, and reads no length on the host.  All tensors are on
    one device; the last dimension of each has stride 1.  Where launches are chained, what
    ``req_to_token``, ``rows`` and ``seq_lens`` hold was complete before the kernel launched
    before this one began; queries, keys and values may be that kernel's.

    Args:
        q: ``[B, H, D]``, other strides are free.
        k_pool: ``[slots, K, D]``; another dtype is converted to that of ``q``.
        v_pool: ``[slots, K, Dv]``, likewise; for latent attention the first columns of
            ``k_pool``.
        req_to_token: ``[R, C]`` int32, the slot of each token.
        rows: ``[B]`` int32, the row of each request in ``req_to_token``.
        seq_lens: ``[B]`` int32, the new token included; 0 makes zeros.
        out: ``[B, H, Dv]``, written; other strides are free.
        partial: ``[B, H, S, Dv]`` float32 contiguous workspace; not touched when S is 1.
        lse: ``[B, H, S]`` float32 contiguous workspace, in base 2; its S is the number of
            splits.
        features: The device.
        scale: Multiplier of the scores.
        window: Only the last ``window`` tokens are visible; 0 means all.
        chunk: Only tokens of the last token's chunk are visible; 0 means all.
        softcap: Scores become ``softcap · tanh(scores / softcap)``; 0 means not.
        sinks: ``[H]`` logits that join the softmax and are dropped.
        k_scale: What a stored key is multiplied by.
        v_scale: What a stored value is multiplied by.
        counters: ``[B · H or more]`` int32 workspace of zeros, left as zeros; lets the last
            program of a request merge, where that is configured.  Without it a second kernel
            does.

    Raises:
        UnsupportedError: D or Dv is too large.
    """
    (batch, heads, head_dim), kv_heads = q.shape, k_pool.shape[1]
    value_dim, splits, group = v_pool.shape[2], lse.shape[2], heads // kv_heads
    choice = _choose(features, batch, group, head_dim, value_dim, k_pool.dtype)
    main, tail = column_blocks(head_dim)
    block_v = max(16, power_of_two(value_dim))
    block_n, block_g = choice["BLOCK_N"], choice["BLOCK_G"]
    last = splits > 1 and counters is not None and choice["merge"] == "last"
    common = {
        "H": heads, "DV": value_dim, "WINDOW": window, "CHUNK": chunk, "BLOCK_N": block_n,
        "LEAST": max(1, choice["tokens_a_split"] // block_n),
        "COLUMNS": min(block_v, choice["merge_columns"]),
    }  # fmt: skip
    merge_rows = min(block_g, power_of_two(group), choice["merge_rows"])
    _split_kernel[(kv_heads * cdiv(group, block_g), batch, splits)](
        q, k_pool, v_pool, req_to_token, rows, seq_lens, sinks, out, partial, lse,
        counters if last else None, scale * k_scale, v_scale,
        q.stride(0), q.stride(1), req_to_token.stride(0), out.stride(0), out.stride(1),
        K_T=k_pool.stride(0), K_H=k_pool.stride(1), V_T=v_pool.stride(0), V_H=v_pool.stride(1),
        G=group, D=head_dim, SOFTCAP=softcap, SPLIT=splits > 1,
        LATENT=_is_latent(k_pool, v_pool) and block_v == main,
        BLOCK_G=block_g, BLOCK_D=main, BLOCK_R=tail, BLOCK_V=block_v,
        ROWS=merge_rows, STEP=_step(choice, merge_rows, common["COLUMNS"]),
        SETTLED=choice["settled"],
        num_warps=choice["num_warps"], num_stages=choice["num_stages"], **choice["options"],
        **common, **features.chain.arguments(choice["release"]),
    )  # fmt: skip
    if splits > 1 and not last:
        step = _step(choice, 1, common["COLUMNS"])
        _merge_kernel[(heads, batch, cdiv(value_dim, common["COLUMNS"]))](
            partial, lse, out, seq_lens, splits, out.stride(0), out.stride(1),
            STEP=min(step, max(8, power_of_two(splits))),
            num_warps=choice["merge_warps"], **common,
            **features.chain.arguments(choice["merge_release"]),
        )  # fmt: skip


def _choose(
    features: Features,
    batch: int,
    group: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
) -> Mapping[str, Any]:
    """Launch sizes, checked."""
    if head_dim > _MAX_KEY or value_dim > _MAX_VALUE:
        raise UnsupportedError(
            f"decode attention in Triton takes keys up to {_MAX_KEY} and values up to "
            f"{_MAX_VALUE}, not {head_dim} and {value_dim}; choose another attention"
        )
    choice = configs.choose(
        "decode_attention",
        features,
        head_dim=head_dim,
        value_dim=value_dim,
        group=group,
        kv_bytes=dtype.itemsize,
        batch=batch,
    )
    if choice["merge"] not in _MERGES:
        raise ContractError(
            f"decode_attention is configured with merge '{choice['merge']}'; "
            f"known: {', '.join(_MERGES)}"
        )
    return choice


def _step(choice: Mapping[str, Any], rows: int, columns: int) -> int:
    """Splits that a program merges at once: a power of two."""
    return int(max(1, min(64, choice["merge_tile"] // (rows * columns))))


def _is_latent(k_pool: Tensor, v_pool: Tensor) -> bool:
    """Whether values are columns of keys."""
    return k_pool.data_ptr() == v_pool.data_ptr() and k_pool.stride() == v_pool.stride()


@triton.jit
def load_slots(table, start, end, BLOCK_N: tl.constexpr):
    """Slots of the tokens ``[start, start + BLOCK_N)``; 0 from ``end`` on.

    Read a tile ahead and carried over the loop: where the addresses of keys hang on a load
    in the same turn, the compiler keeps fewer tiles in flight.
    """
    token = start + tl.arange(0, BLOCK_N)
    return tl.load(table + token, mask=token < end, other=0)


@triton.jit
def _load(pool, slots, columns, live, STRIDE: tl.constexpr, SIZE: tl.constexpr):
    """Rows of a pool; zero where there is no key or no column."""
    where = pool + slots[:, None].to(tl.int64) * STRIDE + columns[None, :]
    if columns.shape[0] > SIZE:
        return tl.load(where, mask=live[:, None] & (columns < SIZE)[None, :], other=0.0)
    return tl.load(where, mask=live[:, None], other=0.0)


@triton.jit
def _span(
    length, splits,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """The first visible key, keys of a split, and how many splits have any (one at least)."""
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(first, length - WINDOW)
    if CHUNK > 0:
        first = tl.maximum(first, (length - 1) // CHUNK * CHUNK)
    tiles = tl.cdiv(length - first, BLOCK_N)
    share = tl.maximum(tl.cdiv(tiles, splits), LEAST)
    return first, share * BLOCK_N, tl.maximum(tl.cdiv(tiles, share), 1)


@triton.jit
def _range(
    lengths, rows, table, table_r,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """What this program attends to: its request's slots, and tokens of its split.

    Returns the slots, the first token, the one behind the last, and how many splits of the
    request have any.
    """
    request = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + request)
    slots = table + tl.load(rows + request).to(tl.int64) * table_r
    first, share, used = _span(length, tl.num_programs(2), WINDOW, CHUNK, BLOCK_N, LEAST)
    begin = first + tl.program_id(2) * share
    return slots, begin, tl.minimum(begin + share, length), used


@triton.jit
def _merge(
    partial, lse, out, place, target, real, column, used,
    DV: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Weigh the splits of some heads and columns by their sums.

    ``place`` and ``target`` are the first split and the first column of each head.  Programs
    on other cores wrote what is read here: it is taken from the cache that all cores share.
    """
    rows: tl.constexpr = place.shape[0]
    inside = (column < DV)[None, :]
    peak = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, column.shape[0]], tl.float32)
    for start in tl.range(0, used, STEP):
        split = start + tl.arange(0, STEP)
        there = (split < used)[:, None] & real[None, :]
        part = place[None, :] + split[:, None]
        sums = tl.load(lse + part, mask=there, other=float("-inf"), cache_modifier=".cg")
        values = tl.load(
            partial + part[:, :, None] * DV + column[None, None, :],
            mask=there[:, :, None] & inside[None, :, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        higher = tl.maximum(peak, tl.max(sums, 0))
        base = tl.where(higher > float("-inf"), higher, 0.0)  # no head: −inf − −inf is NaN
        weight = tl.exp2(sums - base[None, :])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(weight, 0)
        acc = acc * fade[:, None] + tl.sum(weight[:, :, None] * values, 0)
        peak = higher
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    where = out + target[:, None] + column[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=real[:, None] & inside)


# Where the numbers of a pass begin changes their alignment: specialised, that would compile
# while serving.
@triton.jit(do_not_specialize=["table", "rows", "lengths"])
def _split_kernel(
    q, keys, values, table, rows, lengths, sinks, out, partial, lse, counters,
    scale, v_scale,
    q_b, q_h, table_r, out_b, out_h,
    K_T: tl.constexpr, K_H: tl.constexpr, V_T: tl.constexpr, V_H: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr, LATENT: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr, LEAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, SETTLED: tl.constexpr,
    WAIT: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """Attend to the keys of one request, one key head's queries and one split.

    Programs that read the same keys, or neighbours of them, start one after another.
    """
    RELEASE()
    blocks: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    kv_head = (tl.program_id(0) // blocks).to(tl.int64)  # a stride of heads may span the pool
    first_member = tl.program_id(0) % blocks * BLOCK_G
    member = first_member + tl.arange(0, BLOCK_G)
    head = kv_head * G + member
    real = member < G
    request = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    # Lengths and tables are written at the beginning of a pass, kernels ago: where launches are
    # chained they can be read while the one before still makes the queries and the newest key.
    if not SETTLED:
        WAIT()
    slots, begin, end, used = _range(
        lengths, rows, table, table_r, WINDOW, CHUNK, BLOCK_N, LEAST
    )
    ahead = load_slots(slots, begin, end, BLOCK_N)
    if SETTLED:
        WAIT()
    if SPLIT:
        if split >= used:
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
    key_head = keys + kv_head * K_H
    value_head = values + kv_head * V_H
    value_column = tl.arange(0, BLOCK_V)
    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    # Summed over keys after the loop, which saves its warps from meeting once more a tile.
    totals = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)
    if sinks is not None:
        if split == 0:  # a sink is one more key of the first split, whose value is zero
            peak = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
            totals += tl.where(tl.arange(0, BLOCK_N) == 0, 1.0, 0.0)[None, :]
    lane = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        slot = ahead
        ahead = load_slots(slots, start + BLOCK_N, end, BLOCK_N)
        live = lane < end - start
        k_main = _load(key_head, slot, column, live, K_T, D).to(q_main.dtype)
        scores = tl.dot(q_main, tl.trans(k_main), input_precision="ieee")
        if BLOCK_R > 0:
            k_rest = _load(key_head, slot, rest, live, K_T, D).to(q_main.dtype)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
        if SOFTCAP > 0:  # tanh x = 1 - 2 / (1 + e^2x)
            bent = tl.exp2(scores * (scale * (2 * LOG2E / SOFTCAP)))
            scores = (SOFTCAP * LOG2E) * (1 - 2 / (1 + bent))
        else:
            scores = scores * (scale * LOG2E)
        scores = tl.where(live[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weight = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(peak - higher)
        totals = totals * fade[:, None] + weight
        if LATENT:
            v = k_main
        else:  # masked, as 0 · NaN is NaN
            v = _load(value_head, slot, value_column, live, V_T, DV).to(q_main.dtype)
        acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        peak = higher

    total = tl.sum(totals, 1)
    acc = acc / tl.where(total > 0, total, 1)[:, None] * v_scale
    written = real[:, None] & (value_column < DV)[None, :]
    target = out + request * out_b + head[:, None] * out_h + value_column[None, :]
    if not SPLIT or used == 1:
        tl.store(target, acc.to(out.dtype.element_ty), mask=written)
    else:
        place = (request * H + head) * splits + split
        tl.store(lse + place, peak + tl.log2(total), mask=real)
        tl.store(partial + place[:, None] * DV + value_column[None, :], acc, mask=written)
        if counters is not None:
            arrivals = counters + request * tl.num_programs(0) + tl.program_id(0)
            tl.debug_barrier()  # all of this program's stores come before its arrival
            if tl.atomic_add(arrivals, 1) == used - 1:
                tl.store(arrivals, 0)
                parts: tl.constexpr = (DV + COLUMNS - 1) // COLUMNS
                blocks_of_rows: tl.constexpr = (min(G, BLOCK_G) + ROWS - 1) // ROWS
                for item in tl.range(0, parts * blocks_of_rows):
                    row = first_member + item // parts * ROWS + tl.arange(0, ROWS)
                    of = kv_head * G + row
                    _merge(
                        partial, lse, out, (request * H + of) * splits,
                        request * out_b + of * out_h, row < G,
                        item % parts * COLUMNS + tl.arange(0, COLUMNS), used, DV, STEP,
                    )  # fmt: skip


# The number of splits follows the batch: specialised, it would compile while serving.
@triton.jit(do_not_specialize=["lengths", "splits"])
def _merge_kernel(
    partial, lse, out, lengths, splits, out_b, out_h,
    H: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, LEAST: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    WAIT: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """Merge the splits of some columns of one request and head, if there are several."""
    RELEASE()
    head = tl.program_id(0) + tl.arange(0, 1)
    request = tl.program_id(1).to(tl.int64)
    WAIT()
    used = _span(tl.load(lengths + request), splits, WINDOW, CHUNK, BLOCK_N, LEAST)[2]
    if used > 1:
        _merge(
            partial, lse, out, (request * H + head) * splits, request * out_b + head * out_h,
            head < H, tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS), used, DV, STEP,
        )  # fmt: skip
