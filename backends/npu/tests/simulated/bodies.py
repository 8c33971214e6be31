# SPDX-License-Identifier: Apache-2.0
"""What the operators of torch_npu compute, in plain torch, as their documents say it.

Used by every simulated layer.  Attention checks the documented constraints first and names the
one that is broken; the checks are written from the documents, not from ``bedplate_npu.ops``, so
that two readings are compared.  None of it says what silicon does.
"""

from __future__ import annotations

__all__ = ["BODIES", "AttentionCall", "Refused", "attend"]

from dataclasses import dataclass

import torch

EDGE = 2048
CORNER = slice(0, EDGE, 97)
TRIANGLE = torch.ones(EDGE, EDGE, dtype=torch.bool).triu_(1)[CORNER, CORNER]
LAYOUTS = {"BSH": 3, "BSND": 4, "TND": 3}
TND = {(64, 64), (128, 128), (192, 192), (192, 128)}


class Refused(RuntimeError):
    """A documented constraint is broken; a device would fail, or answer wrongly."""


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of both fused-infer operators under one set of names."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    q_lens: list[int] | None
    kv_lens: list[int] | None
    table: torch.Tensor | None
    query_rope: torch.Tensor | None
    key_rope: torch.Tensor | None
    sink: torch.Tensor | None
    heads: int
    kv_heads: int
    scale: float
    before: int
    after: int
    layout: str
    sparse: int
    block: int


def need(fine, text):
    if not fine:
        raise Refused(f"161002: {text}")


def check(c: AttentionCall) -> None:
    """Documented constraints, most general first."""
    need(c.layout in LAYOUTS, f"layout {c.layout}")
    need(c.query.dim() == LAYOUTS[c.layout], f"query rank {c.query.dim()} for {c.layout}")
    need(c.query.dtype in (torch.float16, torch.bfloat16), f"query dtype {c.query.dtype}")
    for name in ("query", "key", "value"):
        need(getattr(c, name).is_contiguous(), f"{name} is not contiguous")
    need(c.heads % c.kv_heads == 0 and c.heads <= 256, f"heads {c.heads} over {c.kv_heads}")
    need(c.heads // c.kv_heads <= 64, "more than 64 query heads of one key head")
    size = c.query.shape[-1] // (c.heads if c.layout == "BSH" else 1)
    need(size <= 512, f"head size {size}")
    if c.layout == "TND":
        check_packed(c, size)
    if c.table is None:
        need(c.block == 0, "a block size without a block table")
    else:
        check_pages(c)
    check_mask(c)
    need((c.query_rope is None) == (c.key_rope is None), "one rotated part is missing")
    if c.query_rope is not None:
        need(size == 512 and c.query_rope.shape[-1] == 64, "latents are 512 and 64 wide")
        need(c.kv_heads == 1, "latents have one key head")
        need(c.heads in (1, 2, 4, 8, 16, 32, 64, 128), f"{c.heads} latent heads")
        need(c.sparse in (0, 3, 4), f"sparse mode {c.sparse} with latents")


def check_packed(c, size):
    need(c.q_lens is not None and c.kv_lens is not None, "TND needs both length lists")
    tokens = c.query.shape[0]
    last = c.q_lens[-1] if c.q_lens else 0
    need(last == tokens, f"queryT({tokens}) != actualSequenceLengthQ({last})")
    need(sorted(c.q_lens) == list(c.q_lens), "query lengths not cumulative")
    need(len(c.q_lens) == len(c.kv_lens), "length lists differ in number")
    need(len(c.q_lens) <= 4096, "more than 4096 sequences")
    if c.table is None:
        need(c.kv_lens[-1] == c.key.shape[0], "key lengths are cumulative without pages")
    if c.query_rope is None:
        value = c.value.shape[-1] // (1 if c.table is None else c.kv_heads)
        need((size, value) in TND, f"head sizes {size}, {value} have no TND")


def check_pages(c):
    need(c.kv_lens is not None, "pages need key lengths")
    need(c.table.dtype == torch.int32, f"block table is {c.table.dtype}")
    need(c.table.dim() == 2 and c.table.is_contiguous(), "block table is not 2-D, contiguous")
    need(c.key.dim() == 3, f"cache of {c.key.dim()} dimensions")
    need(c.key.shape[1] == c.block, f"pages of {c.key.shape[1]}, block size {c.block}")
    single = c.layout == "BSH" and c.query.shape[1] == 1
    if c.layout == "TND":
        need(c.block % 16 == 0 and c.block <= 1024, f"block size {c.block}")
    elif single:
        need(c.block % 16 == 0 and c.block <= 512, f"block size {c.block}")
    else:
        need(c.block in (128, 256, 384, 512), f"block size {c.block}")
    need(c.block >= 128, f"block size {c.block} corrupts on CANN 9.0")
    need(len(c.table) == len(c.kv_lens), "block table and key lengths differ in rows")
    room = c.table.shape[1] * c.block
    need(max(c.kv_lens) <= room, f"{max(c.kv_lens)} keys in a block table of {room}")
    pages = [-(-length // c.block) for length in c.kv_lens]
    used = torch.cat([row[:n] for row, n in zip(c.table, pages, strict=False)])
    need(bool(((used >= 0) & (used < c.key.shape[0])).all()), "a page outside the cache")


def check_mask(c):
    need(c.sparse in (0, 2, 3, 4), f"sparse mode {c.sparse}")
    if c.mask is not None:
        kinds = (torch.bool, torch.int8, torch.uint8)
        need(c.mask.dtype in kinds, f"mask is {c.mask.dtype}")
    if c.sparse:
        need(c.mask is not None, f"sparse mode {c.sparse} without a mask")
        need(list(c.mask.shape) == [EDGE, EDGE], f"mask is {list(c.mask.shape)}")
        need(torch.equal(c.mask[CORNER, CORNER].bool(), TRIANGLE), "mask is not the triangle")


def attend(c: AttentionCall) -> torch.Tensor:
    """The result, in the layout of the query."""
    check(c)
    parts = [one(c, i, query, rope) for i, (query, rope) in enumerate(sequences(c))]
    out = torch.cat(parts).to(c.query.dtype)
    if c.layout == "BSH":
        return out.reshape(*c.query.shape[:2], -1)
    if c.layout == "BSND":
        return out.reshape(*c.query.shape[:2], *out.shape[1:])
    return out


def sequences(c):
    """``[n, H, D]`` queries and rotated parts of each sequence."""
    if c.layout == "TND":
        counts = [b - a for a, b in zip([0, *c.q_lens], c.q_lens, strict=False)]
        queries = torch.split(c.query, counts)
        ropes = [None] * len(counts) if c.query_rope is None else c.query_rope.split(counts)
    else:
        queries = c.query.reshape(*c.query.shape[:2], c.heads, -1).unbind(0)
        ropes = [None] * len(queries) if c.query_rope is None else c.query_rope.unbind(0)
    return list(zip(queries, ropes, strict=False))


def one(c, index, query, rope):
    """``[n, H, Dv]`` float32 of one sequence."""
    key, value, key_rope = stored(c, index)
    q, k, v = query.float(), key.float(), value.float()
    if rope is not None:
        q, k = torch.cat((q, rope.float()), -1), torch.cat((k, key_rope.float()), -1)
    group = c.heads // c.kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("nhd,lhd->hnl", q, k) * c.scale
    hidden = invisible(c, index, len(q), len(k))
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    if c.sink is not None:
        column = c.sink.float()[:, None, None].expand(-1, len(q), 1)
        weights = torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    return torch.einsum("hnl,lhd->nhd", weights, v)


def stored(c, index):
    """Keys, values and rotated keys of one sequence, ``[L, K, ·]``."""
    if c.table is None:
        start = c.kv_lens[index - 1] if index else 0
        span = slice(start, c.kv_lens[index])
        rope = None if c.key_rope is None else c.key_rope[span]
        return c.key[span], c.value[span], rope
    length = c.kv_lens[index]
    pages = c.table[index, : -(-length // c.block)].long()

    def rows(cache, heads):
        return cache[pages].reshape(-1, heads, cache.shape[-1] // heads)[:length]

    rope = None if c.key_rope is None else rows(c.key_rope, 1)
    return rows(c.key, c.kv_heads), rows(c.value, c.kv_heads), rope


def invisible(c, index, queries, keys):
    """``[n, L]`` of what is hidden; ``None`` = nothing."""
    if c.sparse == 0:
        return None if c.mask is None else c.mask[index, 0, :, :keys].bool()
    if c.layout != "TND" and queries == 1 and c.query_rope is None:
        return None  # documented: one query token ignores the sparse mode
    at = torch.arange(queries)[:, None] + (0 if c.sparse == 2 else keys - queries)
    key = torch.arange(keys)[None]
    hidden = key > at
    if c.sparse == 4:
        hidden |= (key < at - c.before) | (key > at + c.after)
    return hidden


def attention_v1(query, key, value, **k):
    out = attend(AttentionCall(
        query=query, key=key, value=value, mask=k["atten_mask"],
        q_lens=k["actual_seq_lengths"], kv_lens=k["actual_seq_lengths_kv"],
        table=k["block_table"], query_rope=k["query_rope"], key_rope=k["key_rope"], sink=None,
        heads=k["num_heads"], kv_heads=k["num_key_value_heads"] or k["num_heads"],
        scale=k["scale"], before=k["pre_tokens"], after=k["next_tokens"],
        layout=k["input_layout"], sparse=k["sparse_mode"], block=k["block_size"],
    ))  # fmt: skip
    return out, torch.zeros(1)


def attention_v2(query, key, value, **k):
    out = attend(AttentionCall(
        query=query, key=key, value=value, mask=k["atten_mask"],
        q_lens=k["actual_seq_qlen"], kv_lens=k["actual_seq_kvlen"], table=k["block_table"],
        query_rope=k["query_rope"], key_rope=k["key_rope"], sink=k["learnable_sink"],
        heads=k["num_query_heads"], kv_heads=k["num_key_value_heads"] or k["num_query_heads"],
        scale=k["softmax_scale"], before=k["pre_tokens"], after=k["next_tokens"],
        layout=k["input_layout"], sparse=k["sparse_mode"], block=k["block_size"],
    ))  # fmt: skip
    return out, torch.zeros(1)


def scatter(key, value, key_cache, value_cache, slots, *, cache_mode="PA_NZ", **_rest):
    need(cache_mode == "Norm", f"cache mode {cache_mode} for caches that are not NZ")
    need(slots.dtype in (torch.int32, torch.int64), f"slots are {slots.dtype}")
    for rows, cache in ((key, key_cache), (value, value_cache)):
        need(rows.dim() == 3 and cache.dim() == 4, "3-D rows and 4-D caches")
        need(rows.is_contiguous() and cache.is_contiguous(), "not contiguous")
        flat = cache.view(-1, *cache.shape[2:])
        need(bool(((slots >= 0) & (slots < len(flat))).all()), "a slot outside the cache")
        if len(slots) <= cache.shape[1]:
            need(len(slots.unique()) == len(slots), "a slot is named twice")
        flat[slots.long()] = rows.to(cache.dtype)


def rms_norm(x, gamma, epsilon=1e-6):
    """Published kernel: the weight in float32, one rounding."""
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


def gemma_rms_norm(x, gamma, epsilon=1e-6):
    return rms_norm(x, gamma.float() + 1, epsilon)


def add_rms_norm(x1, x2, gamma, epsilon=1e-6):
    """Published kernel: rounds the norm before the weight; bfloat16 sums stay wide for it."""
    total = x1 + x2
    wide = x1.float() + x2.float() if x1.dtype == torch.bfloat16 else total.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * rstd).to(x1.dtype) * gamma, rstd, total


def rotary_mul(x, cos, sin, rotary_mode="half", rotate=None):
    need(rotate is None, "a rotation matrix is not simulated")
    need(x.dim() in (3, 4) and x.is_contiguous(), "rotary input is 3-D or 4-D, contiguous")
    wide = x.float()
    if rotary_mode == "half":
        first, second = wide.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    else:
        need(rotary_mode == "interleave", f"rotary mode {rotary_mode}")
        turned = torch.stack((-wide[..., 1::2], wide[..., 0::2]), -1).flatten(-2)
    return (wide * cos.float() + turned * sin.float()).to(x.dtype)


def swiglu(x, dim=-1):
    gate, up = x.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


BODIES = {
    "npu_fused_infer_attention_score": attention_v1,
    "npu_fused_infer_attention_score_v2": attention_v2,
    "npu_scatter_pa_kv_cache": scatter,
    "npu_rms_norm": rms_norm,
    "npu_gemma_rms_norm": gemma_rms_norm,
    "npu_add_rms_norm": add_rms_norm,
    "npu_rotary_mul": rotary_mul,
    "npu_swiglu": swiglu,
}
"""Operator → its body, on host tensors."""
