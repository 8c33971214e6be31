# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803, SIM102 - constants are capitals; an `if` of a constant stands alone
"""Norm of heads, rotation by position, and the write of keys and values, in one launch.

A program takes some heads of one token, of queries, keys or values.  Columns that turn
together are two tiles, so that the thread that reads a number is the one that replaces it.
Every step rounds as torch's own does, and no fused multiply-add joins two; only the order of
the sum of a norm is this kernel's own.  It is the same in all configurations that give a
thread of a tile at least eight numbers (16-bit heads: heads · D ≥ 512 · warps, if all turn),
so those may differ by the number of tokens without changing a bit.

Shapes: T tokens, H query heads, K key/value heads, D and Dv their sizes, R rotated columns,
P positions of the table.
"""

from __future__ import annotations

__all__ = ["qk_norm_rope_write"]

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from bedplate.errors import ContractError
from bedplate.reference.ops import RMS_NORM_ORDERS
from bedplate.reference.rope import ROPE_STYLES
from bedplate_triton import configs
from bedplate_triton.norm import weigh
from bedplate_triton.sizes import cdiv, power_of_two

if TYPE_CHECKING:
    from torch import Tensor

    from bedplate.reference.rope import HeadNorm, RopeTable
    from bedplate_triton.features import Features

_MANY_TOKENS = 4096
"""More tokens choose no other sizes."""
_MAX_FLAT = 16384
"""Numbers of one token's heads that a program can hold for one norm over all."""


def qk_norm_rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    rope: RopeTable | None,
    norm: HeadNorm | None,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    features: Features,
) -> None:
    """See ``bedplate.reference.rope.qk_norm_rope_write``; one launch, nothing waits.

    Tokens that share a slot race for it: only padding may, all of it at slot 0.

    Args:
        q: ``[T, H, D]``, adjacent in the last dimension, other strides are free; changed in
            place. Not touched without ``rope`` and ``norm``.
        k: ``[T, K, D]``, likewise; the same dtype.
        v: ``[T, K, Dv]``, likewise; read only.
        positions: ``[T]`` integers, contiguous, each below P; read for ``rope`` only.
        rope: Tables adjacent in the last dimension, or ``None`` where nothing turns. Steps
            round if the tables have the dtype of the heads; wider ones make them float32.
        norm: ``None`` where nothing is normed.
        keys: ``[num_slots, K, D]`` of any float dtype, adjacent in the last dimension;
            written. ``None``, as ``values`` and ``slots`` then, where nothing is.
        values: ``[num_slots, K, Dv]``, the same.
        slots: ``[T]`` int32 or int64, contiguous, each within the pools.
        features: The device.

    Raises:
        ContractError: The arguments do not fit each other, or features are not adjacent.
    """
    _check_heads(q, k, v, positions)
    _check_pools(k, v, keys, values, slots)
    (tokens, q_heads, size), kv_heads = q.shape, k.shape[1]
    half = 0 if rope is None else _check_rope(rope, size)
    flat = norm is not None and norm.flat
    if norm is not None:
        _check_norm(norm, q_heads, kv_heads, size)
    changes = rope is not None or norm is not None
    if tokens == 0 or not (changes or keys is not None):
        return
    class_of_tokens = min(power_of_two(tokens), _MANY_TOKENS)
    config = configs.choose(
        "rope", features, head_dim=size, q_heads=q_heads, flat=flat, tokens=class_of_tokens
    )
    tile = power_of_two(max(q_heads, kv_heads)) if flat else config["heads"]
    q_groups = cdiv(q_heads, tile) if changes else 0
    kv_groups = cdiv(kv_heads, tile)
    groups = q_groups + kv_groups * (1 if keys is None else 2)
    _turn_and_write[(tokens * groups,)](
        q, k, v, positions, slots, keys, values,
        None if rope is None else rope.cos, None if rope is None else rope.sin,
        None if norm is None else norm.q_weight, None if norm is None else norm.k_weight,
        0.0 if norm is None else norm.eps,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *((0, 0) if keys is None else keys.stride()[:2]),
        *((0, 0) if values is None else values.stride()[:2]),
        0 if rope is None else rope.cos.stride(0),
        Q_HEADS=q_heads, KV_HEADS=kv_heads, SIZE=size, VALUE_SIZE=v.shape[2], HALF=half,
        PAIRS=rope is not None and rope.style == "interleaved",
        STEPS=rope is not None and rope.stepwise and rope.cos.dtype == q.dtype,
        ORDER="" if norm is None else norm.order, FLAT=flat, CHANGES=changes, TILE=tile,
        Q_GROUPS=q_groups, KV_GROUPS=kv_groups, GROUPS=groups,
        num_warps=config["num_warps"], enable_fp_fusion=False,
        **features.chain.arguments(config["release"]),
    )  # fmt: skip


def _check_heads(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
    (tokens, _, size), (count, kv_heads, key_size) = q.shape, k.shape
    if (count, key_size, k.dtype) != (tokens, size, q.dtype) or (
        v.shape[:2] != (count, kv_heads) or positions.shape != (tokens,)
    ):
        raise ContractError(
            f"queries {list(q.shape)} {q.dtype}, keys {list(k.shape)} {k.dtype}, values "
            f"{list(v.shape)} and positions {list(positions.shape)} do not fit each other; "
            "pass [T, H, D], [T, K, D], [T, K, Dv] and [T]"
        )
    if {q.stride(2), k.stride(2), v.stride(2)} != {1} or not positions.is_contiguous():
        raise ContractError("heads and positions must be adjacent in the last dimension")


def _check_pools(
    k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, slots: Tensor | None
) -> None:
    if keys is None and values is None and slots is None:
        return
    if keys is None or values is None or slots is None:
        raise ContractError("keys, values and slots are written together; pass all or none")
    if (slots.shape, keys.shape[1:], values.shape[1:]) != (
        k.shape[:1],
        k.shape[1:],
        v.shape[1:],
    ):
        raise ContractError(
            f"cannot store keys {list(k.shape)} and values {list(v.shape)} at {len(slots)} "
            f"slots of {list(keys.shape[1:])} and {list(values.shape[1:])}; one row a slot"
        )
    if keys.stride(2) != 1 or values.stride(2) != 1 or not slots.is_contiguous():
        raise ContractError("pools and slots must be adjacent in the last dimension")


def _check_rope(rope: RopeTable, size: int) -> int:
    """Columns of the table, R/2."""
    if rope.style not in ROPE_STYLES:
        known = ", ".join(ROPE_STYLES)
        raise ContractError(f"there is no style of rotation '{rope.style}'; known: {known}")
    half = rope.cos.shape[1]
    same = (rope.cos.shape, rope.cos.stride(), rope.cos.dtype)
    if same != (rope.sin.shape, rope.sin.stride(), rope.sin.dtype) or rope.cos.stride(1) != 1:
        raise ContractError("cosines and sines must lie alike, adjacent in the last dimension")
    if not 0 < 2 * half <= size:
        raise ContractError(
            f"a table of {half} columns turns {2 * half}, but heads have {size}; pass [P, R/2]"
        )
    return half


def _check_norm(norm: HeadNorm, q_heads: int, kv_heads: int, size: int) -> None:
    if norm.order not in RMS_NORM_ORDERS:
        known = ", ".join(RMS_NORM_ORDERS)
        raise ContractError(f"heads have no rounding order '{norm.order}'; known: {known}")
    for weight, heads in ((norm.q_weight, q_heads), (norm.k_weight, kv_heads)):
        if (weight is None) != (norm.order == "no_weight"):
            given = "no weight" if weight is None else "a weight"
            raise ContractError(f"heads got {given} with order '{norm.order}'")
        count = heads * size if norm.flat else size
        if weight is not None and (weight.shape != (count,) or not weight.is_contiguous()):
            raise ContractError(
                f"heads got a weight of {list(weight.shape)}; pass [{count}], contiguous"
            )
        if norm.flat and count > _MAX_FLAT:
            raise ContractError(
                f"one norm takes at most {_MAX_FLAT} numbers of a token, not {count}; use the "
                "reference"
            )


# Where positions and slots of a step begin changes their alignment: specialised, that would
# compile anew.
@triton.jit(do_not_specialize=["positions", "slots"])
def _turn_and_write(
    q, k, v, positions, slots, keys, values, cos, sin, q_weight, k_weight, eps,
    q_t, q_h, k_t, k_h, v_t, v_h, keys_t, keys_h, values_t, values_h, table_p,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, STEPS: tl.constexpr,
    ORDER: tl.constexpr, FLAT: tl.constexpr, CHANGES: tl.constexpr, TILE: tl.constexpr,
    Q_GROUPS: tl.constexpr, KV_GROUPS: tl.constexpr, GROUPS: tl.constexpr,
    WAIT: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """Do ``TILE`` heads of one token: queries, keys or values."""
    RELEASE()
    token = (tl.program_id(0) // GROUPS).to(tl.int64)
    group = tl.program_id(0) % GROUPS
    lane = tl.arange(0, TILE)[:, None].to(tl.int64)
    if group < Q_GROUPS:
        head = group * TILE + lane
        _change_heads(
            q + token * q_t + head * q_h, head, head < Q_HEADS, q_weight, eps, token,
            positions, cos, sin, table_p, None, None, keys_t, keys_h, Q_HEADS,
            SIZE, HALF, PAIRS, STEPS, ORDER, FLAT, CHANGES, WAIT,
        )  # fmt: skip
    elif group < Q_GROUPS + KV_GROUPS:
        head = (group - Q_GROUPS) * TILE + lane
        _change_heads(
            k + token * k_t + head * k_h, head, head < KV_HEADS, k_weight, eps, token,
            positions, cos, sin, table_p, slots, keys, keys_t, keys_h, KV_HEADS,
            SIZE, HALF, PAIRS, STEPS, ORDER, FLAT, CHANGES, WAIT,
        )  # fmt: skip
    else:
        head = (group - Q_GROUPS - KV_GROUPS) * TILE + lane
        WAIT()
        if values is not None:
            slot = tl.load(slots + token).to(tl.int64)
            column = tl.arange(0, triton.next_power_of_2(VALUE_SIZE))[None, :]
            fits = (head < KV_HEADS) & (column < VALUE_SIZE)
            row = tl.load(v + token * v_t + head * v_h + column, mask=fits)
            target = values + slot * values_t + head * values_h + column
            tl.store(target, row.to(values.dtype.element_ty), mask=fits)


@triton.jit
def _change_heads(
    rows, head, real, weight, eps, token, positions, cos, sin, table_p,
    slots, pool, pool_t, pool_h, HEADS: tl.constexpr,
    SIZE: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, STEPS: tl.constexpr,
    ORDER: tl.constexpr, FLAT: tl.constexpr, CHANGES: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Norm, turn and store the heads that begin at ``rows``; with a pool also store there.

    The first 2·HALF columns are two tiles that turn with each other, the others are one.
    """
    dtype: tl.constexpr = rows.dtype.element_ty
    rest: tl.constexpr = SIZE - 2 * HALF
    scale_1, scale_2, scale_3 = None, None, None
    if weight is not None:
        weight += head * (SIZE if FLAT else 0)
        if HALF > 0:
            scale_1, scale_2 = _load_pair(weight, real, HALF, PAIRS)
        if rest > 0:
            scale_3 = _load_rest(weight, real, 2 * HALF, rest)
    WAIT()
    if HALF > 0:
        # Every row reads its angles anew, so that they need not travel between threads.
        angle = tl.load(positions + token).to(tl.int64) * table_p + head * 0
    if pool is not None:
        target = pool + tl.load(slots + token).to(tl.int64) * pool_t + head * pool_h
    if HALF > 0:
        first, second = _load_pair(rows, real, HALF, PAIRS)
        c = _load_rest(cos + angle, real, 0, HALF)
        s = _load_rest(sin + angle, real, 0, HALF)
    if rest > 0:
        third = _load_rest(rows, real, 2 * HALF, rest)
    if ORDER != "":
        total = tl.zeros([real.shape[0], 1], tl.float32)
        if HALF > 0:
            total += tl.sum(first * first + second * second, axis=1, keep_dims=True)
        if rest > 0:
            total += tl.sum(third * third, axis=1, keep_dims=True)
        if FLAT:
            total = tl.sum(total, axis=0, keep_dims=True)
        factor = tl.rsqrt(total * (1.0 / (HEADS * SIZE if FLAT else SIZE)) + eps)
        if HALF > 0:
            first = _norm(first, factor, scale_1, ORDER, dtype)
            second = _norm(second, factor, scale_2, ORDER, dtype)
        if rest > 0:
            third = _norm(third, factor, scale_3, ORDER, dtype)
    if HALF > 0:
        minus, plus = _round(second * s, STEPS, dtype), _round(first * s, STEPS, dtype)
        first = _round(first * c, STEPS, dtype) - minus
        second = _round(second * c, STEPS, dtype) + plus
    # The pool first: what that store exchanges between threads has then been read by all.
    if pool is not None:
        if HALF > 0:
            _store_pair(target, real, first.to(dtype), second.to(dtype), HALF, PAIRS)
        if rest > 0:
            _store_rest(target, real, third.to(dtype), 2 * HALF, rest)
    if CHANGES:
        if HALF > 0:
            _store_pair(rows, real, first.to(dtype), second.to(dtype), HALF, PAIRS)
        if rest > 0:
            if ORDER != "":
                _store_rest(rows, real, third.to(dtype), 2 * HALF, rest)


@triton.jit
def _norm(wide, factor, scale, ORDER: tl.constexpr, dtype: tl.constexpr):
    """Normed, weighed and rounded numbers, as float32."""
    wide *= factor
    if scale is not None:
        wide = weigh(wide, scale, ORDER, dtype)
    return wide.to(dtype).to(tl.float32)


@triton.jit
def _round(wide, STEPS: tl.constexpr, dtype: tl.constexpr):
    """As float32 the nearest number of the dtype, if steps round."""
    if STEPS:
        wide = wide.to(dtype).to(tl.float32)
    return wide


@triton.jit
def _load_pair(rows, real, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """The columns that turn together, as two tiles of float32."""
    block: tl.constexpr = triton.next_power_of_2(HALF)
    if PAIRS:
        column = tl.arange(0, 2 * block)[None, :]
        both = tl.load(rows + column, mask=real & (column < 2 * HALF), other=0.0)
        first, second = tl.split(tl.reshape(both, [both.shape[0], block, 2]))
    else:
        column = tl.arange(0, block)[None, :]
        fits = real & (column < HALF)
        first = tl.load(rows + column, mask=fits, other=0.0)
        second = tl.load(rows + HALF + column, mask=fits, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pair(rows, real, first, second, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """What ``_load_pair`` took apart, cast to the dtype of ``rows``."""
    dtype: tl.constexpr = rows.dtype.element_ty
    block: tl.constexpr = triton.next_power_of_2(HALF)
    if PAIRS:
        column = tl.arange(0, 2 * block)[None, :]
        both = tl.reshape(tl.join(first, second), [first.shape[0], 2 * block])
        tl.store(rows + column, both.to(dtype), mask=real & (column < 2 * HALF))
    else:
        column = tl.arange(0, block)[None, :]
        fits = real & (column < HALF)
        tl.store(rows + column, first.to(dtype), mask=fits)
        tl.store(rows + HALF + column, second.to(dtype), mask=fits)


@triton.jit
def _load_rest(rows, real, BEGIN: tl.constexpr, COUNT: tl.constexpr):
    """The ``COUNT`` columns from ``BEGIN`` on, as float32."""
    column = tl.arange(0, triton.next_power_of_2(COUNT))[None, :]
    fits = real & (column < COUNT)
    return tl.load(rows + BEGIN + column, mask=fits, other=0.0).to(tl.float32)


@triton.jit
def _store_rest(rows, real, third, BEGIN: tl.constexpr, COUNT: tl.constexpr):
    """What ``_load_rest`` took, cast to the dtype of ``rows``."""
    column = tl.arange(0, triton.next_power_of_2(COUNT))[None, :]
    fits = real & (column < COUNT)
    tl.store(rows + BEGIN + column, third.to(rows.dtype.element_ty), mask=fits)
