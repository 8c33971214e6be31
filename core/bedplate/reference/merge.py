# SPDX-License-Identifier: Apache-2.0
"""Merging attention over two disjoint sets of keys.

The definition that backends' kernels are checked against; attention that walks a prefix in
chunks calls it once per chunk.

Shapes: T tokens, H heads, Dv value size.
"""

from __future__ import annotations

__all__ = ["merge_attention_states"]

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two key sets, from the attention over each.

    A side without keys has ``lse = −inf``; its output is ignored, whatever it holds, and the
    other side comes back bit for bit.  Both empty: zeros and −inf, never NaN.

    Args:
        out_a: ``[T, H, Dv]`` softmax-weighted values over the first set.
        lse_a: ``[T, H]`` natural log of the sum of exponentials over the first set.
        out_b: As ``out_a``, over the second set.
        lse_b: As ``lse_a``, over the second set.

    Returns:
        ``[T, H, Dv]`` in the dtype of ``out_a`` and ``[T, H]`` in that of ``lse_a``.
    """
    top = torch.maximum(lse_a, lse_b)
    finite = torch.where(top == -torch.inf, 0.0, top)
    weight_a, weight_b = torch.exp(lse_a - finite), torch.exp(lse_b - finite)
    total = weight_a + weight_b
    merged = _weighted(out_a, weight_a) + _weighted(out_b, weight_b)
    merged = merged / torch.where(total == 0, 1.0, total)[..., None]
    return merged.to(out_a.dtype), finite + torch.log(total)


def _weighted(out: Tensor, weight: Tensor) -> Tensor:
    # An empty side may hold NaN, and 0 · NaN would spread it.
    weight = weight[..., None]
    return torch.where(weight == 0, 0.0, out * weight)
