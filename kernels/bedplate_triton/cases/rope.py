# SPDX-License-Identifier: Apache-2.0
"""Norm, rotation and write of heads: every style, layout and order, in place."""

from __future__ import annotations

__all__ = ["CASES"]

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bedplate.reference import rope as reference
from bedplate.reference.ops import RMS_NORM_ORDERS
from bedplate.reference.rope import HeadNorm, RopeTable
from bedplate_triton.cases import NARROW, Case, Inputs
from bedplate_triton.rope import qk_norm_rope_write

if TYPE_CHECKING:
    from bedplate_triton.features import Features

_ROUNDING = 1e-2
"""bfloat16 where the order of a sum decides a last bit."""
_UNWRITTEN = 7.0


def _make(
    device: torch.device,
    seed: int,
    *,
    tokens: int = 5,
    heads: tuple[int, int] = (3, 2),
    size: int = 32,
    value_size: int | None = None,
    interleaved_heads: bool = False,
    turned: int | None = None,
    style: str = "half",
    stepwise: bool = True,
    order: str = "",
    flat: bool = False,
    write: bool = True,
    positions: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    table_dtype: torch.dtype = torch.bfloat16,
    pool_dtype: torch.dtype = torch.bfloat16,
    slot_dtype: torch.dtype = torch.int32,
) -> Inputs:
    """The last third of the tokens is padding: position 0, slot 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.randn(shape, generator=generator).to(device, dtype)

    (q_heads, kv_heads), wide = heads, value_size or size
    turned = size if turned is None else turned
    if interleaved_heads:
        packed = draw(tokens, q_heads * (2 * size + wide))
        heads_of_all = packed.view(tokens, q_heads, -1)
        q, k, v = torch.split(heads_of_all, [size, size, wide], dim=-1)
    else:
        packed = draw(tokens, (q_heads + kv_heads) * size + kv_heads * wide)
        widths = [q_heads * size, kv_heads * size, kv_heads * wide]
        parts = torch.split(packed, widths, dim=-1)
        q, k, v = (
            part.view(tokens, count, -1)
            for part, count in zip(parts, (q_heads, kv_heads, kv_heads), strict=True)
        )
    live = tokens - tokens // 3
    place = torch.randint(positions, (tokens,), generator=generator)
    slots = 1 + torch.randperm(2 * tokens, generator=generator)[:tokens]
    place[live:], slots[live:] = 0, 0
    angles = torch.arange(positions)[:, None] * 100.0 ** -torch.linspace(0, 1, turned // 2)
    tables = (angles.cos().to(device, table_dtype), angles.sin().to(device, table_dtype))
    rope = RopeTable(cos=tables[0], sin=tables[1], style=style, stepwise=stepwise)
    weights = [
        1 + draw(count * size if flat else size) if order and order != "no_weight" else None
        for count in heads
    ]
    norm = HeadNorm(q_weight=weights[0], k_weight=weights[1], eps=1e-6, order=order, flat=flat)

    def pool(width: int) -> Tensor | None:
        shape = (2 * tokens + 1, kv_heads, width)
        return torch.full(shape, torch.nan, device=device).to(pool_dtype) if write else None

    return {
        "packed": packed,
        "arguments": {
            "q": q,
            "k": k,
            "v": v,
            "positions": place.to(device),
            "rope": rope if turned else None,
            "norm": norm if order else None,
            "keys": pool(size),
            "values": pool(wide),
            "slots": slots.to(device, slot_dtype) if write else None,
        },
    }


def _changed(inputs: Inputs) -> tuple[Tensor, ...]:
    """The projection, and all slots but that of padding; NaN where nothing may be written."""
    pools = (inputs["arguments"][name] for name in ("keys", "values"))
    written = [
        torch.nan_to_num(pool[1:].float(), nan=_UNWRITTEN) for pool in pools if pool is not None
    ]
    return inputs["packed"], *written


def _launch(inputs: Inputs, features: Features) -> None:
    qk_norm_rope_write(**inputs["arguments"], features=features)


def _run(inputs: Inputs, features: Features) -> tuple[Tensor, ...]:
    _launch(inputs, features)
    return _changed(inputs)


def _reference(inputs: Inputs) -> tuple[Tensor, ...]:
    reference.qk_norm_rope_write(**inputs["arguments"])
    return _changed(inputs)


def _case(
    name: str, *, tolerance: float | None = None, converts: str = "", **facts: Any
) -> Case:
    if tolerance is None:  # without a sum there is nothing but rounding, step by step
        tolerance = _ROUNDING if facts.get("order") else 0.0
    return Case(
        op="qk_norm_rope_write",
        name=name,
        make=partial(_make, **facts),
        run=_run,
        launch=_launch,
        reference=_reference,
        tolerance=tolerance,
        converts=converts,
    )


def _large(tokens: int, heads: tuple[int, int], **facts: Any) -> Case:
    size = 128
    facts = {"order": "weight_after_cast", "positions": 8192, **facts}
    what = "flat" if facts.get("flat") else facts["order"] or "no norm"
    return Case(
        op="qk_norm_rope_write",
        name=f"{tokens} tokens of {heads[0]}/{heads[1]} heads of {size}, {what}",
        make=partial(_make, tokens=tokens, heads=heads, size=size, **facts),
        run=_run,
        launch=_launch,
        reference=_reference,
        tolerance=_ROUNDING if facts["order"] else 0.0,
        small=False,
        nbytes=tokens * (heads[0] + 2 * heads[1]) * size * 2 * 2 + tokens * size * 4,
        target=0.85 if tokens >= 4096 else 0.0,
    )


CASES = (
    _case("halves turn"),
    _case("halves turn, rounded once", stepwise=False, slot_dtype=torch.int64),
    _case("tables in float32", stepwise=False, table_dtype=torch.float32),
    _case("pairs turn", style="interleaved", tokens=1),
    _case("pairs turn, rounded once", style="interleaved", stepwise=False, write=False),
    _case("part of the columns, halves", size=40, turned=12, heads=(5, 1)),
    _case("part of the columns, pairs", size=48, turned=20, style="interleaved"),
    _case(
        "heads interleaved, some columns turn", heads=(3, 3), interleaved_heads=True, turned=8
    ),
    _case("values of another size", size=24, value_size=40),
    _case("nothing turns: a write", turned=0),
    _case("pool of another dtype", pool_dtype=torch.float16),
    *(
        _case(f"pool of 8 bits{of}", pool_dtype=dtype, tolerance=3e-2, converts=converts)
        for of, dtype, converts in NARROW
    ),
    _case("heads in float32", dtype=torch.float32, table_dtype=torch.float32),
    _case("heads in float16", dtype=torch.float16, table_dtype=torch.float16),
    *(_case(f"norm, {order}", order=order) for order in RMS_NORM_ORDERS),
    _case("norm, some columns turn", order="weight_fp32", size=40, turned=12, write=False),
    _case("norm, pairs turn", order="weight_after_cast", style="interleaved"),
    _case("norm alone", order="weight_after_cast", turned=0),
    _case("one norm over all heads", order="weight_after_cast", flat=True, heads=(5, 2)),
    _case("one norm over all heads, pairs", order="no_weight", flat=True, style="interleaved"),
    *(_large(tokens, heads) for tokens in (1, 8, 256, 4096) for heads in ((32, 8), (16, 8))),
    _large(4096, (32, 8), order=""),
    _large(4096, (32, 32), flat=True),
)
