# SPDX-License-Identifier: Apache-2.0
"""Norms: every rounding order, with and without a sum before."""

from __future__ import annotations

__all__ = ["CASES"]

CASES = ()
