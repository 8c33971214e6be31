# SPDX-License-Identifier: Apache-2.0
"""Decode attention: every kind of call, odd lengths, and the batches of real models.

Shapes: B requests, H query heads, K key/value heads, D key size, Dv value size, S splits.
"""

from __future__ import annotations

__all__ = [
    "CALLS",
    "CASES",
    "LARGE_POOL",
    "MODELS",
    "PAGES",
    "WIDE_POOL",
    "around",
    "call_options",
    "draw",
    "make_case",
    "paged_cache",
    "paged_call",
    "stored",
]

from dataclasses import replace
from functools import partial
from itertools import cycle
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bedplate.contract.attention import AttentionCallSpec
from bedplate.reference.attention import attend, visible
from bedplate_triton.cases import NARROW, Case, Inputs
from bedplate_triton.decode_attention import choose_splits, decode_attention

if TYPE_CHECKING:
    from bedplate_triton.features import Features

_PLAIN = AttentionCallSpec(
    call_id=0, module="attn", num_heads=6, num_kv_heads=2, head_dim=16, value_dim=16, scale=0.3
)
CALLS = {
    "plain": _PLAIN,
    "one head each": replace(_PLAIN, num_heads=2),
    "four a key, 128": replace(_PLAIN, num_heads=8, head_dim=128, value_dim=128, scale=0.09),
    "seven a key": replace(_PLAIN, num_heads=14, head_dim=64, value_dim=64, scale=0.125),
    "eight a key": replace(_PLAIN, num_heads=8, num_kv_heads=1),
    "twenty a key": replace(_PLAIN, num_heads=20, num_kv_heads=1),
    "forty a key": replace(_PLAIN, num_heads=40, num_kv_heads=1),
    "80": replace(_PLAIN, head_dim=80, value_dim=80, scale=0.11),
    "odd sizes": replace(_PLAIN, head_dim=24, value_dim=40),
    "window": replace(_PLAIN, window=5),
    "wide window": replace(_PLAIN, window=100),
    "chunk": replace(_PLAIN, chunk=8),
    "window in a chunk": replace(_PLAIN, chunk=64, window=40),
    "softcap": replace(_PLAIN, softcap=2.0),
    "sinks": replace(_PLAIN, sinks=True),
    "sinks and window": replace(_PLAIN, sinks=True, window=100),
    "latent": replace(
        _PLAIN, num_heads=8, num_kv_heads=1, head_dim=80, value_dim=64, value_in_key=True
    ),
    "latent, narrow": replace(
        _PLAIN, num_kv_heads=1, head_dim=64, value_dim=24, value_in_key=True
    ),
}
"""Kinds of call, small enough for the interpreter."""

LARGE_POOL = 128 << 20
"""Bytes of the pools of a large case: more than any cache between them and a core."""

WIDE_POOL = 5 << 30
"""The same on ``meta``: more than an offset of 32 bits reaches, as caches are in earnest."""

PAGES = (
    (1, 3, torch.bfloat16),
    (1, 8, torch.float16),
    (16, 7, torch.float16),
    (16, 1, torch.bfloat16),
    (64, 4, torch.float32),
    (64, 5, torch.bfloat16),
)
"""Tokens of a page, query heads a key head, dtype: every sort of each with another."""

_LENGTHS = (1, 70, 0, 129)
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def draw(device: torch.device, seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers, drawn where they are needed; on ``meta`` only the shape."""
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def paged_cache(
    device: torch.device,
    seed: int,
    call: AttentionCallSpec,
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    page: int,
    least_bytes: int = 0,
) -> Inputs:
    """Pools and the table of requests of ``lengths``, on shuffled pages.

    No request owns page 0 nor some others, and row 0 of the table is padding; what no token
    owns is NaN in pools that are small enough to be filled twice.
    """
    sizes = [call.head_dim] if call.value_in_key else [call.head_dim, call.value_dim]
    page_bytes = page * call.num_kv_heads * len(sizes) * max(sizes) * dtype.itemsize
    counts = [-(-length // page) for length in lengths]
    if least_bytes and device.type == "meta":
        least_bytes = WIDE_POOL
    pages = max(sum(counts) + 3, least_bytes // page_bytes)
    order = torch.randperm(pages - 1, generator=torch.Generator().manual_seed(seed)).int() + 1
    table = torch.zeros((len(lengths) + 1, max(*lengths, 1)), dtype=torch.int32)
    begin = 0
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True), start=1):
        mine = order[begin : begin + count, None] * page
        table[row, :length] = (mine + torch.arange(page, dtype=torch.int32)).flatten()[:length]
        begin += count
    # One tensor for both, so that they differ in address even on ``meta``.
    wide = (len(sizes), pages * page, call.num_kv_heads, max(sizes))
    pools = draw(device, seed, wide, torch.float32 if dtype.itemsize == 1 else dtype)
    if device.type != "meta" and pools.numel() < 1 << 20:
        used = torch.zeros(wide[1], dtype=torch.bool)
        for row, length in enumerate(lengths, start=1):
            used[table[row, :length].long()] = True
        pools[:, ~used.to(device)] = float("nan")
    pools = pools.to(dtype)
    keys = pools[0, ..., : call.head_dim]
    values = pools[-1, ..., : call.value_dim]
    return {
        "k_pool": keys,
        "v_pool": values,
        "req_to_token": table.to(device),
        "rows": torch.arange(1, len(lengths) + 1, dtype=torch.int32).to(device),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32).to(device),
    }


def call_options(device: torch.device, seed: int, call: AttentionCallSpec) -> dict[str, Any]:
    """Keywords of a kernel for the call, sinks included."""
    return {
        "scale": call.scale,
        "window": call.window or 0,
        "chunk": call.chunk or 0,
        "softcap": call.softcap or 0.0,
        "sinks": draw(device, seed, (call.num_heads,), torch.float32) if call.sinks else None,
    }


def stored(inputs: Inputs, request: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one request, multiplied by the scales of the cache."""
    cache, options = inputs["cache"], inputs["options"]
    length = inputs["lengths"][request]
    slots = cache["req_to_token"][request + 1, :length].long()
    return (
        cache["k_pool"][slots].float() * options.get("k_scale", 1.0),
        cache["v_pool"][slots].float() * options.get("v_scale", 1.0),
    )


def _make(
    device: torch.device,
    seed: int,
    *,
    call: AttentionCallSpec,
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    splits: int,
    page: int,
    least_bytes: int,
    scales: dict[str, float],
) -> Inputs:
    batch, heads = len(lengths), call.num_heads
    packed = (batch, heads + 2 * call.num_kv_heads, call.head_dim)
    counters = torch.zeros(batch * heads, dtype=torch.int32, device=device)
    return {
        "q": draw(device, seed + 1, packed, dtype)[:, :heads],
        "cache": paged_cache(device, seed, call, lengths, kv_dtype, page, least_bytes),
        "options": call_options(device, seed, call) | {"counters": counters} | scales,
        "call": call,
        "lengths": lengths,
        "splits": splits,
    }


def _run(inputs: Inputs, features: Features) -> tuple[Tensor, ...]:
    """Everything that the kernel may not read, or must write, is NaN before in small cases."""
    q, call, splits = inputs["q"], inputs["call"], inputs["splits"]
    batch, heads, _ = q.shape
    splits = splits or choose_splits(
        features,
        batch_size=batch,
        num_heads=heads,
        num_kv_heads=call.num_kv_heads,
        head_dim=call.head_dim,
        value_dim=call.value_dim,
        kv_dtype=inputs["cache"]["k_pool"].dtype,
        max_context_len=max(inputs["lengths"]),
    )
    out = q.new_empty((batch, heads, call.value_dim))
    partial = q.new_empty((batch, heads, splits, call.value_dim), dtype=torch.float32)
    lse = q.new_empty((batch, heads, splits), dtype=torch.float32)
    if inputs["splits"]:
        for tensor in (out, partial, lse):
            tensor.fill_(float("nan"))
    decode_attention(
        q, **inputs["cache"], out=out, partial=partial, lse=lse, features=features,
        **inputs["options"],
    )  # fmt: skip
    return (out,)


def _reference(inputs: Inputs) -> tuple[Tensor, ...]:
    q, call = inputs["q"], inputs["call"]
    out = q.new_zeros((*q.shape[:2], call.value_dim))
    for request, length in enumerate(inputs["lengths"]):
        if length:
            position = torch.arange(length, device=q.device)
            mask = visible(position[-1:], position, call)
            keys, values = stored(inputs, request)
            sinks = inputs["options"]["sinks"]
            out[request] = attend(q[request, None], keys, values, mask, call, sinks)[0]
    return (out,)


def make_case(
    name: str,
    call: AttentionCallSpec,
    *,
    lengths: tuple[int, ...] = _LENGTHS,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    splits: int = 3,
    page: int = 4,
    least_bytes: int = 0,
    scales: dict[str, float] | None = None,
    **facts: Any,
) -> Case:
    """A case; ``splits`` 0 means those that the configuration chooses."""
    return Case(
        op="decode_attention",
        name=name,
        make=partial(
            _make,
            call=call,
            lengths=lengths,
            dtype=dtype,
            kv_dtype=kv_dtype or dtype,
            splits=splits,
            page=page,
            least_bytes=least_bytes,
            scales=scales or {},
        ),
        run=_run,
        reference=_reference,
        tolerance=_TOLERANCE[dtype],
        **facts,
    )


def _large(name: str, call: AttentionCallSpec, lengths: tuple[int, ...], target: float) -> Case:
    """A batch of a model, on pages of 16 tokens; visible keys and values are read once."""
    width = call.head_dim if call.value_in_key else call.head_dim + call.value_dim
    total = sum(min(length, call.window or length) for length in lengths)
    batch = len(lengths)
    ends = 2 * batch * call.num_heads * (call.head_dim + call.value_dim)
    return make_case(
        name,
        call,
        lengths=lengths,
        splits=0,
        page=16,
        least_bytes=LARGE_POOL,
        small=False,
        nbytes=2 * total * call.num_kv_heads * width + ends,
        flops=2 * call.num_heads * (call.head_dim + call.value_dim) * total,
        target=target,
    )


def paged_call(group: int) -> AttentionCallSpec:
    """Two key heads of 32 columns."""
    return replace(_PLAIN, num_heads=2 * group, head_dim=32, value_dim=32, scale=0.2)


def around(page: int) -> tuple[int, ...]:
    """Lengths that end before, at and behind the end of a page, and none at all."""
    return (page - 1, page, page + 1, 0, 2 * page + 1)


MODELS = {
    "32/8/128": replace(
        _PLAIN, num_heads=32, num_kv_heads=8, head_dim=128, value_dim=128, scale=128**-0.5
    ),
    "16/8/128": replace(
        _PLAIN, num_heads=16, num_kv_heads=8, head_dim=128, value_dim=128, scale=128**-0.5
    ),
    "8/4/256": replace(
        _PLAIN, num_heads=8, num_kv_heads=4, head_dim=256, value_dim=256, scale=1 / 16
    ),
    "64/8/64, window and sinks": replace(
        _PLAIN, num_heads=64, num_kv_heads=8, head_dim=64, value_dim=64, scale=1 / 8,
        window=128, sinks=True,
    ),
    "latent 128 of 576": replace(
        _PLAIN, num_heads=128, num_kv_heads=1, head_dim=576, value_dim=512, scale=192**-0.5,
        value_in_key=True,
    ),
}  # fmt: skip
"""Calls of real models."""

_RAGGED = tuple(Random(1).choices(range(512, 1537), k=256))

CASES = (
    *(
        make_case(name, call, splits=splits, dtype=dtype)
        for (name, call), splits, dtype in zip(
            CALLS.items(),
            cycle([3, 1, 2, 2, 3, 2, 1]),
            cycle([torch.float32, torch.bfloat16, torch.bfloat16, torch.float16]),
            strict=False,
        )
    ),
    *(
        make_case(
            f"narrow cache with scales{of}",
            CALLS["four a key, 128"],
            kv_dtype=kv_dtype,
            scales={"k_scale": 0.5, "v_scale": 3.0},
            converts=converts,
        )
        for of, kv_dtype, converts in NARROW
    ),
    *(
        make_case(
            f"pages of {page}, {group} a key",
            paged_call(group),
            dtype=dtype,
            page=page,
            lengths=around(page),
        )
        for page, group, dtype in PAGES
    ),
    *(
        _large(f"{batch} of {length}, {model}", MODELS[model], (length,) * batch, target)
        for batch, length, model, target in (
            (1, 1024, "32/8/128", 0.0),
            (8, 1024, "32/8/128", 0.0),
            (32, 1024, "32/8/128", 0.75),
            (128, 1024, "32/8/128", 0.82),
            (1, 1024, "16/8/128", 0.0),
            (32, 1024, "16/8/128", 0.75),
            (1, 4096, "32/8/128", 0.43),
            (1, 32768, "32/8/128", 0.75),
            (16, 4096, "32/8/128", 0.82),
            (64, 4096, "32/8/128", 0.88),
            (256, 1024, "16/8/128", 0.82),
            (64, 4096, "8/4/256", 0.85),
            (64, 4096, "64/8/64, window and sinks", 0.0),
            (32, 4096, "latent 128 of 576", 0.5),
        )
    ),
    _large("256 of 512 to 1536, 32/8/128", MODELS["32/8/128"], _RAGGED, 0.82),
)
