# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of launch sizes on the host.

Triton's own functions of these names serve inside kernels; called on the host, each takes as
long as a launch has in all.
"""

from __future__ import annotations

__all__ = ["cdiv", "column_blocks", "power_of_two"]

from functools import lru_cache


def cdiv(size: int, step: int) -> int:
    """How many steps cover ``size``."""
    return -(-size // step)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not less than ``size``; 1 for 0."""
    return 1 << max(0, size - 1).bit_length()


@lru_cache(maxsize=64)
def column_blocks(head_dim: int) -> tuple[int, int]:
    """Powers of two that cover D: the main part, and the tail (0 if there is none).

    80 is 64 + 16 and 576 is 512 + 64, which wastes less than 128 and 1,024.
    """
    whole = max(16, power_of_two(head_dim))
    tail = max(16, power_of_two(max(1, head_dim - whole // 2)))
    return (whole // 2, tail) if whole >= 32 and tail < whole // 2 else (whole, 0)
