# SPDX-License-Identifier: Apache-2.0
"""How far numbers are from those that are wanted; shared by everybody who compares."""

from __future__ import annotations

__all__ = ["relative_error", "worst_ulps"]

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
