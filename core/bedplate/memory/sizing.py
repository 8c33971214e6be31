# SPDX-License-Identifier: Apache-2.0
"""How many tokens fit: arithmetic from bytes to tokens, requests and layers.

Pure numbers, no device: the runner measures, asks here, and builds pools from the answers.
Results may be zero or negative; ``require_capacity`` turns that into an error with remedies.
"""

from __future__ import annotations

__all__ = [
    "HybridTokens",
    "cell_bytes",
    "default_max_requests",
    "default_mem_fraction",
    "kv_heads_per_rank",
    "mha_cell_bytes",
    "mla_cell_bytes",
    "profile_max_num_tokens",
    "require_capacity",
    "speculative_num_tokens",
    "split_hybrid",
    "split_hybrid_chunked",
]

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from bedplate.errors import ConfigError, DeviceMemoryError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bedplate.contract.attention import AttentionCallSpec

_GIB: Final = 1 << 30
_UNKNOWN_DEVICE_FRACTION: Final = 0.88
# (device smaller than, GiB reserved, more for each parallel rank): activations, graphs and
# communication buffers grow with what such a device is used for.
_RESERVES_GIB: Final = ((35, 2.8, 0.1), (90, 9.5, 0.5), (160, 12.0, 0.5))
_LARGE_RESERVE_GIB: Final = 32.0
_SPECULATION_RESERVE_GIB: Final = 2.0
_DP_ATTENTION_RESERVE_GIB: Final = 4.0


@dataclass(frozen=True, slots=True)
class HybridTokens:
    """Tokens a layer, by kind of layer: all tokens kept, or only a window of them."""

    full: int
    window: int


def cell_bytes(
    calls: Iterable[AttentionCallSpec], *, itemsize: int, attn_tp_size: int = 1
) -> int:
    """Bytes that one token occupies over all attention calls, head sizes mixed or not.

    Calls that read another's keys and values store nothing; where the value is part of the
    key it is stored once.

    Args:
        calls: Every attention call of the model, with unsplit head counts.
        itemsize: Bytes of one stored number.
        attn_tp_size: Ranks that share one request's attention.
    """
    return itemsize * sum(
        kv_heads_per_rank(call.num_kv_heads, attn_tp_size)
        * (call.head_dim + (0 if call.value_in_key else call.value_dim))
        for call in calls
        if call.alias_of is None
    )


def mha_cell_bytes(kv_heads: int, head_dim: int, num_layers: int, itemsize: int) -> int:
    """Bytes a token where every layer stores equal keys and values; heads of one rank."""
    return 2 * kv_heads * head_dim * num_layers * itemsize


def mla_cell_bytes(kv_lora_rank: int, rope_dim: int, num_layers: int, itemsize: int) -> int:
    """Bytes a token where every layer stores one latent row; the same on every rank."""
    return (kv_lora_rank + rope_dim) * num_layers * itemsize


def kv_heads_per_rank(kv_heads: int, attn_tp_size: int) -> int:
    """Key/value heads on each rank; fewer heads than ranks are replicated.

    Raises:
        ConfigError: Neither number divides the other, so some rank would miss a head.
    """
    if kv_heads % attn_tp_size and attn_tp_size % kv_heads:
        raise ConfigError(
            f"{kv_heads} key/value heads cannot be shared evenly by {attn_tp_size} ranks; one "
            "number must divide the other. Choose another tensor-parallel size",
            kv_heads=kv_heads,
            attn_tp_size=attn_tp_size,
        )
    return max(1, kv_heads // attn_tp_size)


def profile_max_num_tokens(
    *, free_bytes: int, total_before_load_bytes: int, mem_fraction: float, cell: int
) -> int:
    """Tokens that fit after the weights, with ``1 − mem_fraction`` of the memory kept back.

    Args:
        free_bytes: Free now, the least over all ranks.
        total_before_load_bytes: Free before the weights were loaded.
        mem_fraction: Share for weights and cache together.
        cell: Bytes a token, as ``cell_bytes`` gives.

    Returns:
        Tokens; zero or negative if even the reserve does not fit.
    """
    reserve = round(total_before_load_bytes * (1 - mem_fraction))
    return (free_bytes - reserve) // cell


def default_mem_fraction(
    total_bytes: int | None,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    speculation: bool = False,
    dp_attention: bool = False,
) -> float:
    """Share of a device's memory for weights and cache, unless the user says otherwise.

    Args:
        total_bytes: The device's memory; ``None`` if it cannot be told.
        tp_size: Tensor-parallel ranks.
        pp_size: Pipeline stages.
        speculation: A draft model runs beside.
        dp_attention: Attention is data-parallel.

    Raises:
        DeviceMemoryError: The usual reserve is more than the device has.
    """
    if total_bytes is None:
        return _UNKNOWN_DEVICE_FRACTION
    capacity = total_bytes / _GIB
    reserve = _LARGE_RESERVE_GIB
    for bound, base, per_rank in _RESERVES_GIB:
        if capacity < bound:
            reserve = base + per_rank * tp_size * pp_size
            break
    reserve += _SPECULATION_RESERVE_GIB * speculation + _DP_ATTENTION_RESERVE_GIB * dp_attention
    if reserve >= capacity:
        raise DeviceMemoryError(
            f"The device has {capacity:.1f} GiB, and the usual reserve for activations and "
            f"graphs alone is {reserve:.1f} GiB. Set mem_fraction yourself, use fewer ranks, "
            "or choose a device with more memory",
            asked=int(reserve * _GIB),
            free=total_bytes,
            settings=("mem_fraction", "tp_size"),
        )
    return round((capacity - reserve) / capacity, 3)


def default_max_requests(num_tokens: int, context_len: int) -> int:
    """Request rows for a cache of that many tokens: 2048 to 4096."""
    return min(max(num_tokens * 512 // context_len, 2048), 4096)


def speculative_num_tokens(
    num_tokens: int, *, max_requests: int, steps: int, topk: int, draft_tokens: int
) -> int:
    """Tokens of the target's cache once drafts in flight have room too."""
    return num_tokens + max_requests * (steps * topk + draft_tokens) + 100


def split_hybrid(
    tokens_per_layer: int,
    *,
    full_layers: int,
    window_layers: int,
    ratio: float = 0.8,
    page_size: int = 1,
) -> HybridTokens:
    """Share one budget between layers that keep everything and layers that keep a window.

    Args:
        tokens_per_layer: Tokens that would fit if all layers were equal.
        full_layers: Layers that keep every token.
        window_layers: Layers that keep a window.
        ratio: Tokens of a window layer for each token of a full one.
        page_size: Both results are floored to it.

    Raises:
        ConfigError: No layer would store anything.
    """
    exact = Fraction(str(ratio))
    weight = exact * window_layers + full_layers
    if weight <= 0 or exact < 0:
        raise ConfigError(
            f"A budget cannot be split over {full_layers} full and {window_layers} window "
            f"layers at ratio {ratio}; the ratio must not be negative, and must be above 0 "
            "where there are only window layers",
            ratio=ratio,
        )
    full = int(tokens_per_layer * (full_layers + window_layers) / weight)
    return HybridTokens(_floor(full, page_size), _floor(int(full * exact), page_size))


def split_hybrid_chunked(
    tokens_per_layer: int,
    *,
    chunk: int,
    context_len: int,
    ratio: float = 0.8,
    page_size: int = 1,
) -> HybridTokens:
    """``split_hybrid`` where three of four layers see only their own chunk.

    Args:
        tokens_per_layer: Tokens that would fit if all layers were equal.
        chunk: Tokens of one chunk.
        context_len: Tokens of the longest request.
        ratio: From 0 (a chunked layer keeps as much as a full one) to 1 (only its chunk's
            share of the context).
        page_size: Both results are floored to it.
    """
    exact = Fraction(str(ratio))
    kept = (1 - exact) + exact * Fraction(chunk, context_len)
    unit = 4 * tokens_per_layer / (3 * kept + 1)
    full = 4 * tokens_per_layer - int(3 * unit * kept)
    return HybridTokens(_floor(full, page_size), _floor(int(unit * kept), page_size))


def require_capacity(num_tokens: int, *, cell: int, free_bytes: int, page_size: int = 1) -> int:
    """``num_tokens`` floored to whole pages, at least one.

    Raises:
        DeviceMemoryError: Not one page fits; carries ``asked``, ``free`` and ``settings``.
    """
    usable = _floor(num_tokens, page_size)
    if usable > 0:
        return usable
    asked = cell * page_size
    raise DeviceMemoryError(
        f"No room for keys and values: {num_tokens} tokens fit beside the weights and the "
        f"reserve, but a page is {page_size} tokens ({asked} bytes; {free_bytes} are free). "
        "Raise mem_fraction, lower max_batch_size, or choose a smaller kv_dtype",
        asked=asked,
        free=free_bytes,
        settings=("mem_fraction", "max_batch_size", "kv_dtype"),
    )


def _floor(num_tokens: int, page_size: int) -> int:
    return num_tokens // page_size * page_size
