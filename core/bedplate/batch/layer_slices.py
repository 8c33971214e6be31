# SPDX-License-Identifier: Apache-2.0
"""Which layers each slice of a split prefill runs. Pure integers."""

from __future__ import annotations

__all__ = ["layer_slices"]

from bedplate.errors import ConfigError


def layer_slices(num_layers: int, count: int) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of layers, ``count`` at a time; the last may be shorter.

    Only the first slice needs attention metadata, and only the last yields logits.

    Raises:
        ConfigError: ``count`` is below 1.
    """
    if count < 1:
        raise ConfigError(f"A slice of {count} layers makes no progress; give at least 1")
    return tuple(
        (start, min(start + count, num_layers)) for start in range(0, num_layers, count)
    )
