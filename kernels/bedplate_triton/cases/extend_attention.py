# SPDX-License-Identifier: Apache-2.0
"""Extend attention: every kind of call, odd extensions, and prompts of real models.

Shapes: T new tokens, n of one request, L its length, H query heads, K key/value heads.
"""

from __future__ import annotations

__all__ = ["CALLS", "CASES", "make_case"]

from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bedplate.reference.attention import attend, visible
from bedplate_triton.cases import NARROW, Case, Inputs, decode_attention
from bedplate_triton.cases.decode_attention import (
    LARGE_POOL,
    MODELS,
    PAGES,
    around,
    call_options,
    draw,
    paged_cache,
    paged_call,
    stored,
)
from bedplate_triton.extend_attention import extend_attention

if TYPE_CHECKING:
    from bedplate.contract.attention import AttentionCallSpec
    from bedplate_triton.features import Features

_PLAIN = decode_attention.CALLS["plain"]
CALLS = decode_attention.CALLS | {
    "both ways": replace(_PLAIN, causal=False),
    "both ways in a chunk": replace(_PLAIN, causal=False, chunk=50, window=20),
}
"""Kinds of call, small enough for the interpreter."""

_LENGTHS = (3, 129, 20)
_FRESH = {
    "whole": _LENGTHS,
    "prefix": (2, 40, 7),
    "mixed": (1, 90, 0),  # the last is a row of padding: it writes nothing
}
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_QUERIES = 1024
"""Query tokens whose scores the reference holds at once."""


def _make(
    device: torch.device,
    seed: int,
    *,
    call: AttentionCallSpec,
    lengths: tuple[int, ...],
    fresh: tuple[int, ...],
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    page: int,
    least_bytes: int,
    with_lse: bool,
    options: dict[str, Any],
) -> Inputs:
    heads = call.num_heads
    width = (sum(fresh), heads + 2 * call.num_kv_heads, call.head_dim)
    counts = torch.tensor(fresh, dtype=torch.int32)
    cache = paged_cache(device, seed, call, lengths, kv_dtype, page, least_bytes)
    cache["start_loc"] = (counts.cumsum(0) - counts).int().to(device)
    cache["extend_lens"] = counts.to(device)
    return {
        "q": draw(device, seed + 1, width, dtype)[:, :heads],
        "cache": cache,
        "options": call_options(device, seed, call) | {"causal": call.causal} | options,
        "call": call,
        "lengths": lengths,
        "fresh": fresh,
        "with_lse": with_lse,
    }


def _run(inputs: Inputs, features: Features) -> tuple[Tensor, ...]:
    q, call = inputs["q"], inputs["call"]
    out = q.new_empty((len(q), call.num_heads, call.value_dim))
    lse = q.new_empty(q.shape[:2], dtype=torch.float32) if inputs["with_lse"] else None
    if inputs["with_lse"]:
        out.fill_(float("nan"))
    extend_attention(
        q, **inputs["cache"], out=out, lse=lse, features=features,
        max_extend_len=max(inputs["fresh"]), **inputs["options"],
    )  # fmt: skip
    return (out,) if lse is None else (out, lse)


def _reference(inputs: Inputs) -> tuple[Tensor, ...]:
    q, call = inputs["q"], inputs["call"]
    out = q.new_zeros((len(q), call.num_heads, call.value_dim))
    lse = q.new_zeros(q.shape[:2], dtype=torch.float32)
    at = 0
    for request, (length, count) in enumerate(
        zip(inputs["lengths"], inputs["fresh"], strict=True)
    ):
        keys, values = stored(inputs, request)
        position = torch.arange(length, device=q.device)
        for first in range(0, count, _QUERIES):
            rows = slice(at + first, at + min(first + _QUERIES, count))
            here = position[length - count :][first : first + _QUERIES]
            mask, sinks = visible(here, position, call), inputs["options"]["sinks"]
            out[rows] = attend(q[rows], keys, values, mask, call, sinks)
            if inputs["with_lse"]:
                lse[rows] = _log_sums(q[rows], keys, mask, call, sinks)
        at += count
    return (out, lse) if inputs["with_lse"] else (out,)


def _log_sums(
    q: Tensor, keys: Tensor, mask: Tensor, call: AttentionCallSpec, sinks: Tensor | None
) -> Tensor:
    """``[n, H]``: log of the sum of exponentials of what ``attend`` takes the softmax of."""
    keys = keys.repeat_interleave(call.num_heads // call.num_kv_heads, dim=1)
    scores = torch.einsum("nhd,lhd->nhl", q.float(), keys) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    sums = scores.masked_fill(~mask[:, None], float("-inf")).logsumexp(-1)
    return sums if sinks is None else torch.logaddexp(sums, sinks)


def make_case(
    name: str,
    call: AttentionCallSpec,
    *,
    lengths: tuple[int, ...] = _LENGTHS,
    fresh: tuple[int, ...] = _FRESH["prefix"],
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    page: int = 4,
    least_bytes: int = 0,
    with_lse: bool = False,
    options: dict[str, Any] | None = None,
    **facts: Any,
) -> Case:
    """A case; ``options`` are further keywords of the kernel."""
    return Case(
        op="extend_attention",
        name=name,
        make=partial(
            _make,
            call=call,
            lengths=lengths,
            fresh=fresh,
            dtype=dtype,
            kv_dtype=kv_dtype or dtype,
            page=page,
            least_bytes=least_bytes,
            with_lse=with_lse,
            options=options or {},
        ),
        run=_run,
        reference=_reference,
        tolerance=_TOLERANCE[dtype],
        **facts,
    )


def _large(
    name: str,
    lengths: tuple[int, ...],
    fresh: tuple[int, ...],
    target: float,
    *,
    model: str = "32/8/128",
    options: dict[str, Any] | None = None,
) -> Case:
    """Prompts on pages of 16 tokens; keys and values are read once at least."""
    call = MODELS[model]
    seen = sum(
        min(position + 1, call.window or length)
        for length, count in zip(lengths, fresh, strict=True)
        for position in range(length - count, length)
    )
    heads, kv_heads, width = call.num_heads, call.num_kv_heads, call.head_dim + call.value_dim
    return make_case(
        name,
        call,
        lengths=lengths,
        fresh=fresh,
        page=16,
        least_bytes=LARGE_POOL,
        options=options,
        small=False,
        nbytes=2 * width * (kv_heads * sum(lengths) + heads * sum(fresh)),
        flops=2 * heads * width * seen,
        target=target,
    )


CASES = (
    *(
        make_case(name, call, fresh=fresh, dtype=dtype, with_lse=True)
        for (name, call), fresh, dtype in zip(
            CALLS.items(),
            cycle(_FRESH.values()),
            cycle([torch.float32, torch.bfloat16, torch.bfloat16, torch.float16]),
            strict=False,
        )
    ),
    *(
        make_case(
            f"narrow cache with scales{of}",
            CALLS["four a key, 128"],
            fresh=_FRESH["mixed"],
            kv_dtype=kv_dtype,
            options={"k_scale": 0.5, "v_scale": 3.0},
            converts=converts,
        )
        for of, kv_dtype, converts in NARROW
    ),
    *(
        make_case(
            f"pages of {page}, {group} a key",
            paged_call(group),
            lengths=around(page),
            fresh=tuple(min(length, 2 + i * 9) for i, length in enumerate(around(page))),
            dtype=dtype,
            page=page,
        )
        for page, group, dtype in PAGES
    ),
    make_case("invariant", CALLS["sinks and window"], options={"invariant": True}),
    make_case(
        "many of unlike length",
        CALLS["plain"],
        lengths=(*(1, 5) * 32, 70, 1, 150, 2),
        fresh=(*(1, 0) * 32, 70, 0, 50, 2),
        dtype=torch.float32,
    ),
    *(
        _large(f"prompt of {size}", (size,), (size,), target)
        for size, target in ((1024, 0.3), (4096, 0.45), (8192, 0.45))
    ),
    _large("2048 on a prefix of 6144", (8192,), (2048,), 0.45),
    _large("16 prompts of 1024", (1024,) * 16, (1024,) * 16, 0.4),
    _large("verify 4 of each of 16", (4096,) * 16, (4,) * 16, 0.0),
    _large("prompt of 4096, invariant", (4096,), (4096,), 0.0, options={"invariant": True}),
    *(
        _large(f"prompt of {size}, {model}", (size,), (size,), 0.0, model=model)
        for size, model in (
            (4096, "8/4/256"),
            (4096, "64/8/64, window and sinks"),
            (2048, "latent 128 of 576"),
        )
    ),
)
