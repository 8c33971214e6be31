# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of launch sizes on the host.

Triton's own functions of these names serve inside kernels; called on the host, each takes as
long as a launch has in all.
"""

from __future__ import annotations

__all__ = ["cdiv", "power_of_two"]


def cdiv(size: int, step: int) -> int:
    """How many steps cover ``size``."""
    return -(-size // step)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not less than ``size``; 1 for 0."""
    return 1 << max(0, size - 1).bit_length()
