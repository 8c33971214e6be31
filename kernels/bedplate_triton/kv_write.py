# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803 - constants that are functions are capitals
"""Keys and values of new tokens into their slots, in one launch for both.

Slots are read on the device only, so the write can be recorded. Pools call this from
``KVPool.write``.

Shapes: T tokens, K key-value heads, D and Dv their sizes.
"""

from __future__ import annotations

__all__ = ["write_kv"]

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from bedplate.errors import ContractError
from bedplate_triton.sizes import cdiv, power_of_two

if TYPE_CHECKING:
    from torch import Tensor

    from bedplate_triton.features import Features

_TILE_ELEMENTS = 2048


def write_kv(
    k: Tensor,
    v: Tensor | None,
    slots: Tensor,
    k_pool: Tensor,
    v_pool: Tensor | None,
    *,
    features: Features,
) -> None:
    """Store ``k[i], v[i]`` at ``slots[i]``, cast to the pool's dtype; nothing waits.

    Tokens that share a slot race for it: only padding may, all of it at slot 0.

    Args:
        k: ``[T, K, D]``, adjacent in the last dimension, other strides are free.
        v: ``[T, K, Dv]``, the same; ``None`` where only keys are stored.
        slots: ``[T]`` int32 or int64 on the device, contiguous, each within the pool.
        k_pool: ``[num_slots, K, D]``, adjacent in the last dimension; written.
        v_pool: ``[num_slots, K, Dv]``, the same; neither read nor written without ``v``.
        features: The device.

    Raises:
        ContractError: The shapes do not fit each other, or features are not adjacent.
    """
    _check("keys", k, slots, k_pool)
    if v is None:
        v = v_pool = k
        value_size = 0
    else:
        if v_pool is None:
            raise ContractError("write_kv got values, but no pool of values; pass both")
        _check("values", v, slots, v_pool)
        value_size = v.shape[2]
    tokens, heads, key_size = k.shape
    if tokens == 0:
        return
    block = power_of_two(max(key_size, value_size))
    tile = min(power_of_two(heads), max(_TILE_ELEMENTS // block, 1))
    _write_tokens[(tokens, cdiv(heads, tile))](
        k, v, slots, k_pool, v_pool,
        *k.stride()[:2], *v.stride()[:2], *k_pool.stride()[:2], *v_pool.stride()[:2],
        heads=heads, key_size=key_size, value_size=value_size, tile=tile, block=block,
        num_warps=4, **features.chain.arguments(),
    )  # fmt: skip


def _check(what: str, rows: Tensor, slots: Tensor, pool: Tensor) -> None:
    if (slots.shape, rows.shape[1:]) != (rows.shape[:1], pool.shape[1:]):
        raise ContractError(
            f"cannot store {what} {list(rows.shape)} at {len(slots)} slots of "
            f"{list(pool.shape[1:])}; one row a slot"
        )
    if rows.stride(2) != 1 or pool.stride(2) != 1 or not slots.is_contiguous():
        raise ContractError(f"{what}, pool and slots must be adjacent in the last dimension")


# Where slots of a step begin changes its alignment: specialised, that would compile anew.
@triton.jit(do_not_specialize=["slots"])
def _write_tokens(
    k, v, slots, k_pool, v_pool,
    k_token, k_head, v_token, v_head, k_slot, k_slot_head, v_slot, v_slot_head,
    heads: tl.constexpr, key_size: tl.constexpr, value_size: tl.constexpr,
    tile: tl.constexpr, block: tl.constexpr, WAIT: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """Copy ``tile`` heads of one token."""
    RELEASE()
    WAIT()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    head = (tl.program_id(1) * tile + tl.arange(0, tile))[:, None]
    column = tl.arange(0, block)[None, :]
    fits = (head < heads) & (column < key_size)
    row = tl.load(k + token * k_token + head * k_head + column, mask=fits)
    target = k_pool + slot * k_slot + head * k_slot_head + column
    tl.store(target, row.to(k_pool.dtype.element_ty), mask=fits)
    if value_size > 0:
        fits = (head < heads) & (column < value_size)
        row = tl.load(v + token * v_token + head * v_head + column, mask=fits)
        target = v_pool + slot * v_slot + head * v_slot_head + column
        tl.store(target, row.to(v_pool.dtype.element_ty), mask=fits)
