# SPDX-License-Identifier: Apache-2.0
"""Sequence lengths that a graph takes as host integers, refreshed before each replay.

For devices whose attention reads lengths on the host.  They come from the batch's host
mirror, so no step waits for the device.
"""

from __future__ import annotations

__all__ = ["padded_host_lengths"]

from typing import TYPE_CHECKING

from bedplate.errors import ReplayError

if TYPE_CHECKING:
    from collections.abc import Sequence


def padded_host_lengths(
    seq_lens: Sequence[int], padded_batch_size: int, *, draft_tokens: int = 0
) -> list[int]:
    """One length per captured request: the real ones, then zeros.

    Args:
        seq_lens: Lengths of the real requests.
        padded_batch_size: Requests of the captured graph.
        draft_tokens: Tokens under verification, not yet part of the lengths.

    Raises:
        ReplayError: More requests than the graph holds.
    """
    missing = padded_batch_size - len(seq_lens)
    if missing < 0:
        raise ReplayError(
            f"{len(seq_lens)} requests do not fit a graph captured for {padded_batch_size}; "
            "can_run should have refused the batch",
            batch_size=len(seq_lens),
            graph=padded_batch_size,
        )
    return [int(length) + draft_tokens for length in seq_lens] + [0] * missing
