# SPDX-License-Identifier: Apache-2.0
"""How far numbers are from those that are wanted; shared by everybody who compares."""

from __future__ import annotations

__all__ = ["differing_share", "relative_error", "rounding_bias", "worst_ulps"]

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """``‖got − want‖ / ‖want‖``; infinite if a number is missing, or shape or dtype differs."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    gap = (got.double() - want.double()).norm()
    error = float(gap / want.double().norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def worst_ulps(got: Tensor, want: Tensor) -> float:
    """Largest difference in units of the last place of the largest number of its row.

    One wrong element among thousands hardly moves ``relative_error``; here it stands alone.
    """
    if not want.numel():
        return 0.0
    unit = torch.finfo(want.dtype).eps
    wide = want.double().flatten(0, -2) if want.ndim > 1 else want.double()[None]
    gap = (got.double() - want.double()).abs().view_as(wide)
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(want.dtype).tiny)
    worst = float((gap / (scale * unit)).amax())
    return worst if worst == worst else float("inf")


def differing_share(got: Tensor, want: Tensor) -> float:
    """Share of elements whose numbers are not the same."""
    return float((got != want).double().mean()) if want.numel() else 0.0


def rounding_bias(got: Tensor, want: Tensor) -> float:
    """Mean of ``|got| − |want|`` in units of each number's own last place.

    Sums in another order err to both sides and give about 0; cutting bits off instead of
    rounding gives −0.5.
    """
    if not want.numel():
        return 0.0
    size = want.double().abs()
    unit = torch.exp2(torch.floor(torch.log2(size.clamp_min(torch.finfo(want.dtype).tiny))))
    gap = (got.double().abs() - size) / (unit * torch.finfo(want.dtype).eps)
    return float(gap.mean())
