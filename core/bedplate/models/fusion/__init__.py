# SPDX-License-Identifier: Apache-2.0
"""Faster forms of parts of a model, found by behaviour and proven by numbers."""

from __future__ import annotations

from bedplate.models.fusion.calls import trial_forward
from bedplate.models.fusion.plan import FusionMode, FusionPlan, fuse

__all__ = ["FusionMode", "FusionPlan", "fuse", "trial_forward"]
