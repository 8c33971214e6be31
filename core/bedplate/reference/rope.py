# SPDX-License-Identifier: Apache-2.0
"""Norm of heads, rotation by position, and the write of keys and values, as one operation.

Between the product that makes queries, keys and values and attention itself a model does
nothing else, so a device does all of it in one launch.  Any part may be absent.

Shapes: T tokens, H query heads, K key/value heads, D head size, R rotated columns, P
positions of the table.
"""

from __future__ import annotations

__all__ = ["ROPE_STYLES", "HeadNorm", "RopeTable", "apply_rope", "qk_norm_rope_write"]

from dataclasses import dataclass

import torch
from torch import Tensor

ROPE_STYLES = ("half", "interleaved")
"""Which columns turn together: c and c + R/2, or 2c and 2c + 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeTable:
    """Cosines and sines of every position, as the model itself computes and rounds them.

    Attributes:
        cos: ``[P, R/2]``.
        sin: ``[P, R/2]``, same dtype.
        style: One of ``ROPE_STYLES``; the first R columns of a head turn, the others stay.
        stepwise: Both products and their sum each round to the dtype of the heads; else all
            is computed in float32 and rounded once.
    """

    cos: Tensor
    sin: Tensor
    style: str = "half"
    stepwise: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNorm:
    """A root-mean-square norm of queries and keys before they turn.

    Attributes:
        q_weight: ``[D]``, or ``[H·D]`` if ``flat``; ``None`` for the order ``no_weight``.
        k_weight: The same for keys.
        eps: Added to the mean square.
        order: One of ``bedplate.reference.ops.RMS_NORM_ORDERS``.
        flat: One norm over all heads of a token instead of one for each head.
    """

    q_weight: Tensor | None
    k_weight: Tensor | None
    eps: float
    order: str
    flat: bool = False


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
    """Norm and turn ``q`` and ``k`` in place; with pools, write ``k`` and ``v`` there.

    Args:
        q: ``[T, H, D]``, a view with any strides but 1 for the last; changed in place.
        k: ``[T, K, D]``, likewise.
        v: ``[T, K, Dv]``, likewise; not changed.
        positions: ``[T]`` int64, each below P.
        rope: ``None`` where nothing turns.
        norm: ``None`` where nothing is normed.
        keys: ``[slots, K, D]`` of any float dtype, written at ``slots``; ``None`` = no write.
        values: ``[slots, K, Dv]``, given with ``keys``.
        slots: ``[T]`` integers; slot 0 swallows padding.
    """
    for heads in (q, k):
        out = heads
        if norm is not None:
            out = _norm_heads(out, norm.q_weight if heads is q else norm.k_weight, norm)
        if rope is not None:
            out = apply_rope(out, positions, rope)
        if out is not heads:
            heads.copy_(out)
    if keys is not None and values is not None and slots is not None:
        keys[slots.long()] = k.to(keys.dtype)
        values[slots.long()] = v.to(values.dtype)


def apply_rope(heads: Tensor, positions: Tensor, rope: RopeTable) -> Tensor:
    """``[T, H, D]`` turned by the positions of its tokens; new storage.

    With ``stepwise`` every product and the sum round to the dtype of the heads.
    """
    cos, sin = rope.cos[positions][:, None], rope.sin[positions][:, None]
    half = cos.shape[-1]
    turned, rest = heads[..., : 2 * half], heads[..., 2 * half :]
    if not rope.stepwise:
        turned, cos, sin = turned.float(), cos.float(), sin.float()
    if rope.style == "half":
        first, second = turned[..., :half], turned[..., half:]
    else:
        first, second = turned[..., 0::2], turned[..., 1::2]
    out = (first * cos - second * sin, second * cos + first * sin)
    if rope.style == "half":
        joined = torch.cat(out, dim=-1)
    else:
        joined = torch.stack(out, dim=-1).flatten(-2)
    return torch.cat((joined.to(heads.dtype), rest), dim=-1)


def _norm_heads(heads: Tensor, weight: Tensor | None, norm: HeadNorm) -> Tensor:
    # `ops` offers this module's operation, so it cannot be imported above.
    from bedplate.reference.ops import rms_norm

    x = heads.flatten(-2) if norm.flat else heads
    return rms_norm(x, weight, norm.eps, norm.order).view(heads.shape)
