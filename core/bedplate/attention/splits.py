# SPDX-License-Identifier: Apache-2.0
"""Into how many parts decode attention cuts each request's keys.

Few long requests leave most of a device idle unless their keys are cut; many short ones
only pay for merging.  Host integers, from the batch's host mirror of the lengths.
"""

from __future__ import annotations

__all__ = ["num_kv_splits"]

from math import ceil, log2
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

# Query heads that one program handles together when they share keys.
_HEADS_PER_PROGRAM = 16


def num_kv_splits(
    seq_lens: npt.NDArray[np.int32],
    *,
    num_heads: int,
    num_kv_heads: int,
    cores: int | None,
    max_splits: int = 8,
    queries_per_request: int = 1,
) -> npt.NDArray[np.int32]:
    """Splits of each request, 1 to ``max_splits``.

    Args:
        seq_lens: ``[B]`` lengths; zeros count as one split.
        num_heads: Query heads of this rank.
        num_kv_heads: Key/value heads of this rank.
        cores: Cores of the device; ``None`` = unknown, then everything is cut fully.
        max_splits: Upper bound; partial results are stored for so many.
        queries_per_request: Rows of queries that share one request's keys.

    Returns:
        ``[B]`` int32.
    """
    if cores is None or not len(seq_lens):
        return np.full(len(seq_lens), max_splits, np.int32)
    longest, shortest = max(int(seq_lens.max()), 1), max(int(seq_lens.min()), 1)
    if 8 * longest < 10 * shortest:
        shortest = longest
    # Long parts keep a core busy longer than the count of programs tells.
    busy = int(cores * max(log2(longest / 64), 1))
    grid = len(seq_lens) * queries_per_request * _programs(num_heads, num_kv_heads)
    by_length = ceil(longest / min(ceil(longest / shortest), max_splits))
    by_cores = ceil(longest / min(ceil(busy / grid), max_splits))
    return np.maximum(-(-seq_lens // min(by_length, by_cores)), 1).astype(np.int32)


def _programs(num_heads: int, num_kv_heads: int) -> int:
    shared = num_heads // num_kv_heads
    return num_heads if shared == 1 else ceil(num_heads / min(_HEADS_PER_PROGRAM, shared))
