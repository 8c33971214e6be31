# SPDX-License-Identifier: Apache-2.0
"""Rotary positions of the new tokens of a pass.

Arithmetic only, with a torch form for the device and a numpy form for the host.  The
scheduler uses the host forms; backends may replace the device forms by a kernel that gives
the same numbers.

Shapes: B requests, T new tokens (T = sum of the new tokens per request), L prompt tokens.
"""

from __future__ import annotations

__all__ = ["clamp_position", "compute_position", "mrope_positions", "positions_cpu"]

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from torch import Tensor

    Int32Array = npt.NDArray[np.int32]
    Int64Array = npt.NDArray[np.int64]


def compute_position(
    extend_prefix_lens: Tensor | None, extend_seq_lens: Tensor, extend_seq_lens_sum: int
) -> tuple[Tensor, Tensor]:
    """Positions ``prefix … prefix + new`` of each request, packed; no synchronisation.

    Args:
        extend_prefix_lens: ``[B]`` integers, cached tokens; ``None`` = no prefix anywhere.
        extend_seq_lens: ``[B]`` integers on the same device, new tokens; zeros are fine.
        extend_seq_lens_sum: T, known on the host; must equal the sum.

    Returns:
        ``[T]`` int64 positions and ``[B]`` int32 first row of each request.
    """
    seq_lens = extend_seq_lens.to(torch.int32)
    start_loc = torch.cumsum(seq_lens, 0, dtype=torch.int32) - seq_lens
    shift = -start_loc.to(torch.int64)
    if extend_prefix_lens is not None:
        shift = shift + extend_prefix_lens
    rows = torch.arange(extend_seq_lens_sum, dtype=torch.int64, device=seq_lens.device)
    # output_size is what keeps this from asking the device how many rows there are.
    spread = torch.repeat_interleave(shift, seq_lens, output_size=extend_seq_lens_sum)
    return rows + spread, start_loc


def clamp_position(seq_lens: Tensor) -> Tensor:
    """Position of each request's last token, ``max(seq_len − 1, 0)``, as int64."""
    return (seq_lens.to(torch.int64) - 1).clamp_(min=0)


def positions_cpu(
    extend_prefix_lens: Int32Array, extend_seq_lens: Int32Array
) -> tuple[Int64Array, Int32Array]:
    """``compute_position`` on the host: ``[T]`` int64 positions, ``[B]`` int32 first rows."""
    ends = np.cumsum(extend_seq_lens, dtype=np.int64)
    starts = ends - extend_seq_lens
    total = int(ends[-1]) if len(ends) else 0
    positions = np.arange(total) + np.repeat(extend_prefix_lens - starts, extend_seq_lens)
    return positions, starts.astype(np.int32)


def mrope_positions(
    prefix_lens: Int32Array,
    seq_lens: Int32Array,
    deltas: Int64Array,
    tables: Sequence[Int64Array | None] | None = None,
) -> Int64Array:
    """Three-row positions of models that place text, height and width apart.

    Every mode is one rule, so none can be missing: decode is one new token after
    ``seq_len − 1``, a slice of a split prefill is an extend.  Reads host arrays only.

    Args:
        prefix_lens: ``[B]`` tokens before the new ones; ``seq_lens − 1`` in decode.
        seq_lens: ``[B]`` new tokens per request; ones in decode.
        deltas: ``[B]`` what to add to a position beyond the table; 0 for text.
        tables: Per request ``[3, L]`` positions of the prompt, ``None`` for text only.

    Returns:
        ``[3, T]`` int64.
    """
    linear, starts = positions_cpu(prefix_lens, seq_lens)
    result = np.tile(linear + np.repeat(deltas, seq_lens), (3, 1))
    for i, table in enumerate(tables or ()):
        if table is not None:
            known = table[:, prefix_lens[i] : prefix_lens[i] + seq_lens[i]]
            result[:, starts[i] : starts[i] + known.shape[1]] = known
    return result
