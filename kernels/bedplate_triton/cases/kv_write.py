# SPDX-License-Identifier: Apache-2.0
"""Writes of keys and values: dtypes, odd sizes, keys alone, padding, and pools of real models.

Shapes: T tokens, K key/value heads, D key size, Dv value size.
"""

from __future__ import annotations

__all__ = ["CASES"]

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bedplate_triton.cases import NARROW, Case, Inputs
from bedplate_triton.cases.decode_attention import LARGE_POOL, WIDE_POOL, draw
from bedplate_triton.kv_write import write_kv

if TYPE_CHECKING:
    from bedplate_triton.features import Features


def _make(
    device: torch.device,
    seed: int,
    *,
    shape: tuple[int, int, int, int] = (5, 2, 32, 32),
    dtype: torch.dtype = torch.bfloat16,
    pool_dtype: torch.dtype | None = None,
    slot_dtype: torch.dtype = torch.int32,
    padding: int = 1,
    large: bool = False,
) -> Inputs:
    """Rows of a packed projection of ``shape`` T, K, D, Dv; keys alone where Dv is 0.

    The last ``padding`` tokens go to slot 0.
    """
    tokens, heads, *sizes = shape
    stored = pool_dtype or dtype
    packed = draw(device, seed, (tokens, heads, sum(sizes)), dtype)
    wide = heads * sum(sizes) * stored.itemsize
    most = WIDE_POOL if device.type == "meta" else LARGE_POOL
    count = most // wide if large else 2 * tokens + 1
    generator = torch.Generator().manual_seed(seed)
    slots = 1 + torch.randperm(count - 1, generator=generator)[:tokens]
    slots[tokens - padding :] = 0
    k, v = torch.split(packed, sizes, dim=-1)
    keys, values = (torch.zeros((count, heads, n), device=device, dtype=stored) for n in sizes)
    return {
        "k": k,
        "v": v if sizes[1] else None,
        "slots": slots.to(device, slot_dtype),
        "k_pool": keys,
        "v_pool": values if sizes[1] else None,
    }


def _launch(inputs: Inputs, features: Features) -> None:
    write_kv(**inputs, features=features)


def _run(inputs: Inputs, features: Features) -> tuple[Tensor, ...]:
    _launch(inputs, features)
    return _pools(inputs)


def _reference(inputs: Inputs) -> tuple[Tensor, ...]:
    """One indexed copy each."""
    for rows, pool in ((inputs["k"], inputs["k_pool"]), (inputs["v"], inputs["v_pool"])):
        if rows is not None:
            pool[inputs["slots"].long()] = rows.to(pool.dtype)
    return _pools(inputs)


def _pools(inputs: Inputs) -> tuple[Tensor, ...]:
    """All slots but that of padding."""
    pools = (inputs["k_pool"], inputs["v_pool"])
    return tuple(pool[1:].float() for pool in pools if pool is not None)


def _case(name: str, *, tolerance: float = 0.0, converts: str = "", **facts: Any) -> Case:
    return Case(
        op="kv_write",
        name=name,
        make=partial(_make, **facts),
        run=_run,
        launch=_launch,
        reference=_reference,
        tolerance=tolerance,
        converts=converts,
    )


def _large(shape: tuple[int, int, int, int]) -> Case:
    tokens, heads, *sizes = shape
    return Case(
        op="kv_write",
        name=f"{tokens} tokens, {heads} heads of {sizes[0]} and {sizes[1]}",
        make=partial(_make, shape=shape, large=True),
        run=_run,
        launch=_launch,
        reference=_reference,
        tolerance=0.0,
        small=False,
        nbytes=2 * tokens * heads * sum(sizes) * 2,
    )


CASES = (
    _case("bfloat16"),
    _case("float16, slots of 64 bits", dtype=torch.float16, slot_dtype=torch.int64),
    _case("float32", dtype=torch.float32),
    _case("odd sizes", shape=(7, 3, 24, 40), padding=3),
    _case("keys alone", shape=(3, 1, 80, 0)),
    _case("pool of another dtype", pool_dtype=torch.float16),
    *(
        _case(f"pool of 8 bits{of}", pool_dtype=dtype, tolerance=3e-2, converts=converts)
        for of, dtype, converts in NARROW
    ),
    *(_large((tokens, 8, 128, 128)) for tokens in (1, 8192)),
    _large((8192, 1, 576, 0)),
)
