# SPDX-License-Identifier: Apache-2.0
"""The only file that calls operators of torch_npu: thin wrappers with checks of their own.

The operators trust their caller: a scale that was left out is 1.0, a length list that is not
cumulative reads other tokens, a page size that does not fit is silent.  So every documented
constraint is checked here, on the host and without reading the device, before the call.  All
but the first tensors are passed by keyword, because positions differ between releases.

Operators round where their kernels do, and an operation rounds where the model does; the two
need not agree.  What the published kernels show (A2 and A3, CANN's ops-nn and ops-transformer):

| operator | rounds |
|---|---|
| rms_norm, gemma_rms_norm | once, after the weight |
| add_rms_norm | the norm, and after the weight; the sum before it not in bfloat16 |
| swiglu | once, after the product |
| rotary_mul | once, after the sum |

An operator is used where that is the operation's meaning, and steps are taken apart elsewhere.

Shapes: T tokens, B sequences, S query tokens of one sequence, H query heads, K key/value heads,
D head size, Dv value size, P pages, W columns of the block table.
"""

from __future__ import annotations

__all__ = [
    "DTYPES",
    "MASK_SIZE",
    "PAGE_SIZE",
    "TND_SIZES",
    "act_and_mul",
    "add_norm",
    "fused_infer_attention",
    "gemma_rms_norm",
    "has",
    "qk_norm_rope_write",
    "register",
    "rms_norm",
    "rotate",
    "store_kv",
    "swiglu",
    "write_kv",
]

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bedplate.contract import OpProvider, OpRegistry, OpRequest, Support
from bedplate.errors import ContractError
from bedplate.reference.ops import RMS_NORM_ORDERS, PartialProduct
from bedplate.reference.rope import HeadNorm, RopeTable, apply_rope

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DTYPES = (torch.float16, torch.bfloat16)
"""What the fused operators read."""
PAGE_SIZE = 128
"""Tokens a page: the one size that every layout takes; smaller ones have corrupted silently."""
MASK_SIZE = 2048
"""Edge of the triangular mask that sparse modes 2, 3 and 4 want, whatever the lengths are."""
TND_SIZES = ((64, 64), (128, 128), (192, 192), (192, 128))
"""Sizes of keys and values that packed layouts take."""

_RANKS = {"TND": 3, "BSND": 4, "BSH": 3}
_MASK_DTYPES = (torch.bool, torch.int8, torch.uint8)
_MOST_SEQUENCES, _MOST_HEADS, _MOST_GROUP, _MOST_SIZE = 4096, 256, 64, 512
_MASKED_MODES = (2, 3, 4)
_BAND = 4
_LATENT, _LATENT_ROPE, _MOST_LATENT_HEADS = 512, 64, 128


def has(name: str) -> bool:
    """Whether this release of torch_npu has an operator."""
    return hasattr(torch.ops.npu, name)


def fused_infer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: str,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    q_lens: Sequence[int] | None = None,
    kv_lens: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    mask: Tensor | None = None,
    sparse_mode: int = 0,
    window: int | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of any pass.

    Args:
        query: ``[T, H, D]`` (TND), ``[B, S, H, D]`` (BSND) or ``[B, 1, H·D]`` (BSH).
        key: ``[T, K, D]`` fresh keys, or ``[P, PAGE_SIZE, K·D]`` with a block table.
        value: Likewise with Dv.
        layout: ``TND``, ``BSND`` or ``BSH``.
        num_heads: H.
        num_kv_heads: K.
        scale: Multiplier of the scores.
        q_lens: ``[B]`` cumulative query tokens, the last is T; TND only.
        kv_lens: ``[B]`` host integers: length of each sequence with a block table, cumulative
            without.
        block_table: ``[B, W]`` int32, contiguous.
        mask: ``[MASK_SIZE, MASK_SIZE]``, true above the diagonal, for sparse modes 2 to 4;
            ``[B, 1, 1, W·PAGE_SIZE]``, true where hidden, for mode 0 with S = 1.
        sparse_mode: 0 = all or ``mask``, 3 = causal from the last token, 4 = a band of it.
        window: Tokens that a query sees, itself included; sparse mode 4 only.
        query_rope: Rotated part of latent queries, ``[…, H, 64]``.
        key_rope: Rotated part of latent keys, ``[P, PAGE_SIZE, 64]``.
        sinks: ``[H]`` logits that join the softmax.

    Returns:
        Attended values in the layout of ``query``.

    Raises:
        ContractError: A documented constraint is not kept; all faults are listed.
    """
    faults = list(_tensor_faults(query, key, value, layout, num_heads, num_kv_heads))
    if not faults:  # the others compute with what these have checked
        faults = [
            *_length_faults(query, key, layout, q_lens, kv_lens, block_table),
            *_mask_faults(query, layout, mask, sparse_mode, window, block_table),
            *_size_faults(query, value, layout, num_heads, num_kv_heads, query_rope, key_rope),
        ]
    if faults:
        raise ContractError(
            f"fused-infer attention ({layout}) would fail or answer wrongly: "
            f"{'; '.join(faults)}. Report it with the model"
        )
    q_list = None if q_lens is None else list(q_lens)
    kv_list = None if kv_lens is None else list(kv_lens)
    # A band counts the tokens before the query's own.
    before = 2147483647 if window is None else window - 1
    after = 2147483647 if window is None else 0
    page = 0 if block_table is None else PAGE_SIZE
    if sinks is not None:
        out: Tensor = torch.ops.npu.npu_fused_infer_attention_score_v2(
            query, key, value, query_rope=query_rope, key_rope=key_rope, atten_mask=mask,
            actual_seq_qlen=q_list, actual_seq_kvlen=kv_list, block_table=block_table,
            learnable_sink=sinks, num_query_heads=num_heads, num_key_value_heads=num_kv_heads,
            softmax_scale=scale, pre_tokens=before, next_tokens=after, input_layout=layout,
            sparse_mode=sparse_mode, block_size=page,
        )[0]  # fmt: skip
        return out
    plain: Tensor = torch.ops.npu.npu_fused_infer_attention_score(
        query, key, value, atten_mask=mask, actual_seq_lengths=q_list,
        actual_seq_lengths_kv=kv_list, block_table=block_table, query_rope=query_rope,
        key_rope=key_rope, num_heads=num_heads, scale=scale, pre_tokens=before,
        next_tokens=after, input_layout=layout, num_key_value_heads=num_kv_heads,
        sparse_mode=sparse_mode, block_size=page,
    )[0]  # fmt: skip
    return plain


def store_kv(
    key: Tensor, value: Tensor, *, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> None:
    """Write keys and values at their slots, in place.

    The operator wants every slot once, while all padding has slot 0: padding is spread over
    page 0, which nobody reads.

    Args:
        key: ``[T, K, D]``, any strides.
        value: ``[T, K, Dv]``, any strides.
        key_cache: ``[P, PAGE_SIZE, K, D]``.
        value_cache: ``[P, PAGE_SIZE, K, Dv]``.
        slots: ``[T]`` int32 on the device.

    Raises:
        ContractError: A documented constraint is not kept.
    """
    faults = list(_store_faults(key, value, key_cache, value_cache, slots))
    if faults:
        raise ContractError(f"keys and values cannot be stored: {'; '.join(faults)}")
    scratch = torch.arange(len(slots), dtype=torch.int32, device=slots.device) % PAGE_SIZE
    torch.ops.npu.npu_scatter_pa_kv_cache(
        key.contiguous(), value.contiguous(), key_cache, value_cache,
        torch.where(slots == 0, scratch, slots), cache_mode="Norm",
    )  # fmt: skip


def write_kv(k: Tensor, v: Tensor, *, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Cast to the cache's dtype and write by one operator, or by two copies where it has none.

    Args:
        k: ``[T, K, D]``, any strides.
        v: ``[T, K, Dv]``, any strides.
        keys: ``[P·PAGE_SIZE, K, D]``, whole pages.
        values: ``[P·PAGE_SIZE, K, Dv]``.
        slots: ``[T]`` integers on the device.
    """
    k, v = k.to(keys.dtype), v.to(values.dtype)
    if keys.dtype not in DTYPES:
        keys.index_put_((slots,), k)
        values.index_put_((slots,), v)
        return
    store_kv(
        k, v, key_cache=keys.view(-1, PAGE_SIZE, *keys.shape[1:]),
        value_cache=values.view(-1, PAGE_SIZE, *values.shape[1:]), slots=slots.int(),
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, order: str) -> Tensor:
    """``bedplate.reference.ops.rms_norm``.

    One operator where the weight comes before it rounds, else one without a weight and a
    product.

    Args:
        x: ``[…, E]``.
        weight: ``[E]``, or ``None``.
        eps: Added to the mean square.
        order: One of ``RMS_NORM_ORDERS``.
    """
    if order == "one_plus_weight_fp32" and weight is not None:
        return gemma_rms_norm(x, weight, epsilon=eps)
    whole = order == "weight_fp32" and weight is not None
    gamma = weight if whole else x.new_ones(x.shape[-1])
    out: Tensor = torch.ops.npu.npu_rms_norm(x.contiguous(), gamma, epsilon=eps)[0]
    return out if whole or weight is None else weight * out


def gemma_rms_norm(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    """The norm whose weight is ``1 + weight``."""
    out: Tensor = torch.ops.npu.npu_gemma_rms_norm(x.contiguous(), weight, epsilon=epsilon)[0]
    return out


def add_norm(
    x: Tensor | PartialProduct,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    order: str,
) -> tuple[Tensor, Tensor]:
    """``bedplate.reference.ops.add_norm``, in one operator where that rounds the sum."""
    if isinstance(x, PartialProduct):
        x = x.whole()
    if residual is None:
        return rms_norm(x, weight, eps, order), x
    if order != "weight_after_cast" or x.dtype == torch.bfloat16:
        total = residual + x
        return rms_norm(total, weight, eps, order), total
    normed, _, total = torch.ops.npu.npu_add_rms_norm(
        residual.contiguous(), x.contiguous(), weight, epsilon=eps
    )
    return normed, total


def swiglu(x: Tensor) -> Tensor:
    """``[…, 2·E]`` → ``[…, E]``: silu of the first half times the second."""
    out: Tensor = torch.ops.npu.npu_swiglu(x.contiguous(), dim=-1)
    return out


def act_and_mul(x: Tensor, act: str) -> Tensor:
    """``bedplate.reference.ops.act_and_mul`` for silu."""
    if act != "silu":
        raise ContractError(f"the operator computes silu, not {act}; ask supports() first")
    return swiglu(x)


def rotate(heads: Tensor, *, cos: Tensor, sin: Tensor, style: str) -> Tensor:
    """``[T, H, R]`` turned by the angles of its tokens, rounded once; new storage.

    Args:
        heads: Any strides.
        cos: ``[T, R/2]``; wider angles than the heads are not rounded: the heads are widened.
        sin: The same.
        style: ``half`` or ``interleaved``.
    """
    dtype, heads = heads.dtype, heads.to(torch.promote_types(heads.dtype, cos.dtype))
    cos, sin = cos.to(heads.dtype), sin.to(heads.dtype)
    if style == "half":
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    else:
        cos, sin = (torch.stack((x, x), dim=-1).flatten(-2) for x in (cos, sin))
    mode = "half" if style == "half" else "interleave"
    out: Tensor = torch.ops.npu.npu_rotary_mul(
        heads.contiguous()[None], cos[None, :, None], sin[None, :, None], rotary_mode=mode
    )[0]
    return out.to(dtype)


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
) -> None:
    """``bedplate.reference.rope.qk_norm_rope_write`` by the operators above, in place."""
    for heads in (q, k):
        if norm is not None:
            weight = norm.q_weight if heads is q else norm.k_weight
            rows = heads.flatten(-2) if norm.flat else heads
            heads.copy_(rms_norm(rows, weight, norm.eps, norm.order).view(heads.shape))
        if rope is not None:
            _turn(heads, positions, rope)
    if keys is not None and values is not None and slots is not None:
        write_kv(k, v, keys=keys, values=values, slots=slots)


def _turn(heads: Tensor, positions: Tensor, rope: RopeTable) -> None:
    """Turn the first columns in place: by the operator, unless each product has to round."""
    turning = heads[..., : 2 * rope.cos.shape[-1]]
    if rope.stepwise and heads.dtype != torch.float32:
        turning.copy_(apply_rope(turning, positions, rope))
        return
    cos, sin = rope.cos[positions], rope.sin[positions]
    turning.copy_(rotate(turning, cos=cos, sin=sin, style=rope.style))


def register(registry: OpRegistry) -> None:
    """Offer what this file has; the core verifies each use by its numbers."""
    for op, call, supports in (
        ("rms_norm", rms_norm, _supports_norm),
        ("add_norm", add_norm, _supports_norm),
        ("act_and_mul", act_and_mul, _supports_act),
        ("qk_norm_rope_write", qk_norm_rope_write, _supports_heads),
    ):
        registry.register(OpProvider(op=op, provider="npu", call=call, supports=supports))


_FLOATS = ("bfloat16", "float16", "float32")


def _supports_dtype(request: OpRequest) -> Support:
    if request.dtype not in _FLOATS:
        return Support.no(f"the operators read {', '.join(_FLOATS)}, not {request.dtype}")
    return Support.yes("by operators of the device")


def _supports_norm(request: OpRequest) -> Support:
    order = request.attributes.get("order")
    if order not in RMS_NORM_ORDERS:
        return Support.no(f"there is no operator for the norm {order}; torch has one")
    return _supports_dtype(request)


def _supports_act(request: OpRequest) -> Support:
    act = request.attributes.get("act")
    if act != "silu":
        return Support.no(f"computes silu, not {act}")
    if request.dtype != "float32":
        return Support.no(f"the operator does not round the activation to {request.dtype}")
    return Support.yes("one operator")


def _supports_heads(request: OpRequest) -> Support:
    norm = request.attributes.get("norm")
    if norm and norm not in RMS_NORM_ORDERS:
        return Support.no(f"there is no operator for the norm {norm}")
    return _supports_dtype(request)


def _tensor_faults(
    query: Tensor, key: Tensor, value: Tensor, layout: str, num_heads: int, num_kv_heads: int
) -> Iterator[str]:
    if layout not in _RANKS:
        yield f"layout {layout} is none of {', '.join(_RANKS)}"
    elif query.dim() != _RANKS[layout]:
        yield f"a query of {query.dim()} dimensions is not {layout}"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not tensor.is_contiguous():
            yield f"{name} is not contiguous"
        if tensor.dtype not in DTYPES or tensor.dtype != query.dtype:
            yield f"{name} is {tensor.dtype}, beside a query of {query.dtype}"
    if not 0 < num_heads <= _MOST_HEADS or not 0 < num_kv_heads <= _MOST_HEADS:
        yield f"{num_heads} query and {num_kv_heads} key heads; at most {_MOST_HEADS}"
    elif num_heads % num_kv_heads or num_heads // num_kv_heads > _MOST_GROUP:
        yield f"{num_heads} query heads over {num_kv_heads} key heads"


def _length_faults(
    query: Tensor,
    key: Tensor,
    layout: str,
    q_lens: Sequence[int] | None,
    kv_lens: Sequence[int] | None,
    block_table: Tensor | None,
) -> Iterator[str]:
    for name, lens in (("query", q_lens), ("key", kv_lens)):
        if lens is not None and not all(type(length) is int for length in lens):
            yield f"{name} lengths must be host integers"
            return
    tokens = query.shape[0]
    if layout == "TND":
        if q_lens is None or kv_lens is None:
            yield "TND needs both length lists"
            return
        yield from _cumulative_faults("query", q_lens, tokens)
        if len(q_lens) != len(kv_lens) or len(q_lens) > _MOST_SEQUENCES:
            yield f"{len(q_lens)} query and {len(kv_lens)} key lengths; as many, up to 4096"
        if block_table is None:
            yield from _cumulative_faults("key", kv_lens, key.shape[0])
    elif q_lens is not None:
        yield f"{layout} takes no query lengths here"
    if block_table is not None:
        sequences = len(q_lens) if q_lens is not None else tokens
        yield from _page_faults(key, block_table, kv_lens, sequences)
    elif layout != "TND":
        yield f"{layout} is used with pages only"


def _cumulative_faults(name: str, lens: Sequence[int], total: int) -> Iterator[str]:
    steps = [b - a for a, b in zip((0, *lens), lens, strict=False)]
    if not lens or lens[-1] != total:
        yield f"{name} lengths end at {lens[-1] if lens else 0}, but there are {total} tokens"
    if any(step < 1 for step in steps):
        yield f"{name} lengths are not cumulative"


def _page_faults(
    key: Tensor, table: Tensor, kv_lens: Sequence[int] | None, sequences: int
) -> Iterator[str]:
    if table.dtype != torch.int32 or table.dim() != 2 or not table.is_contiguous():
        shape = f"{table.dtype} of {list(table.shape)}"
        yield f"the block table is {shape}, not int32, of two dimensions and contiguous"
        return
    if key.dim() != 3 or key.shape[1] != PAGE_SIZE:
        yield f"pages are {list(key.shape)}, not [P, {PAGE_SIZE}, K·D]"
    if kv_lens is None:
        yield "pages need key lengths"
        return
    if len(kv_lens) != sequences or table.shape[0] != sequences:
        yield f"{len(kv_lens)} key lengths and {table.shape[0]} rows for {sequences} sequences"
    if kv_lens and min(kv_lens) < 1:
        yield "a key length is below 1"
    room = table.shape[1] * PAGE_SIZE
    if kv_lens and max(kv_lens) > room:
        yield f"a sequence has {max(kv_lens)} tokens, but the block table holds {room}"


def _mask_faults(
    query: Tensor,
    layout: str,
    mask: Tensor | None,
    sparse_mode: int,
    window: int | None,
    block_table: Tensor | None,
) -> Iterator[str]:
    if (window is not None) != (sparse_mode == _BAND):
        yield f"window {window} with sparse mode {sparse_mode}; a band is mode {_BAND}"
    if sparse_mode in _MASKED_MODES:
        if mask is None or list(mask.shape) != [MASK_SIZE, MASK_SIZE]:
            yield f"sparse mode {sparse_mode} needs a mask of {MASK_SIZE}×{MASK_SIZE}"
        if layout == "BSH":
            yield f"one query token ignores sparse mode {sparse_mode}"
    elif sparse_mode:
        yield f"sparse mode {sparse_mode} is not used here"
    elif mask is not None and block_table is not None:
        wanted = [query.shape[0], 1, 1, block_table.shape[1] * PAGE_SIZE]
        if layout != "BSH" or list(mask.shape) != wanted:
            yield f"the mask is {list(mask.shape)}, not {wanted} for one query token"
    elif layout == "TND":
        yield "packed queries need a causal mask"
    if mask is not None and mask.dtype not in _MASK_DTYPES:
        yield f"the mask is {mask.dtype}"


def _size_faults(
    query: Tensor,
    value: Tensor,
    layout: str,
    num_heads: int,
    num_kv_heads: int,
    query_rope: Tensor | None,
    key_rope: Tensor | None,
) -> Iterator[str]:
    size = query.shape[-1] // (num_heads if layout == "BSH" else 1)
    value_size = value.shape[-1] // (num_kv_heads if value.shape[1] == PAGE_SIZE else 1)
    if (query_rope is None) != (key_rope is None):
        yield "one of two rotated parts is missing"
    elif query_rope is not None and key_rope is not None:
        if (size, query_rope.shape[-1], key_rope.shape[-1]) != (
            _LATENT, _LATENT_ROPE, _LATENT_ROPE,
        ):  # fmt: skip
            yield f"latents are {size} and {query_rope.shape[-1]} wide, not 512 and 64"
        if num_kv_heads != 1 or num_heads & (num_heads - 1) or num_heads > _MOST_LATENT_HEADS:
            yield f"{num_heads} latent heads; a power of two up to {_MOST_LATENT_HEADS}"
        if not (query_rope.is_contiguous() and key_rope.is_contiguous()):
            yield "a rotated part is not contiguous"
    elif layout == "TND" and value.dim() == 3 and value.shape[1] != PAGE_SIZE:
        if (size, value.shape[-1]) not in TND_SIZES:
            yield f"heads of {size} and {value.shape[-1]} have no packed form"
    elif layout == "TND" and (size, value_size) not in TND_SIZES:
        yield f"heads of {size} and {value_size} have no packed form"
    elif size > _MOST_SIZE or size % 16:
        yield f"heads of {size}; at most {_MOST_SIZE} and a multiple of 16"


def _store_faults(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> Iterator[str]:
    if slots.dtype != torch.int32 or slots.dim() != 1:
        yield f"slots are {slots.dtype} of {slots.dim()} dimensions, not a row of int32"
    for name, rows, cache in (("key", key, key_cache), ("value", value, value_cache)):
        if cache.dim() != 4 or cache.shape[1] != PAGE_SIZE or not cache.is_contiguous():
            yield f"{name} cache is {list(cache.shape)}, not contiguous pages of {PAGE_SIZE}"
        elif rows.dim() != 3 or rows.shape[1:] != cache.shape[2:] or len(rows) != len(slots):
            shape = list(cache.shape[2:])
            yield f"{name} is {list(rows.shape)} for {len(slots)} slots of {shape}"
        if rows.dtype != cache.dtype:
            yield f"{name} is {rows.dtype}, its cache {cache.dtype}"
