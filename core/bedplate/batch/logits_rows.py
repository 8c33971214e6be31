# SPDX-License-Identifier: Apache-2.0
"""Which rows of a pass need logits, and which of those are sampled from.

Pure numpy on the host: the rows travel to the device with the step's staging copy, so a
long prompt costs one row of logits, not thousands.

Shapes: B requests, T new tokens, R rows of logits.
"""

from __future__ import annotations

__all__ = ["LogitsRows", "select_logits_rows"]

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Int32Array = npt.NDArray[np.int32]
    Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsRows:
    """Rows of one extend pass.

    Attributes:
        rows: ``[R]`` int64 tokens whose logits are wanted, ascending.
        sample: ``[B]`` int64 index into ``rows`` of each request's last token.
        prompt: int64 indices into ``rows`` that predict prompt tokens.
    """

    rows: Int64Array
    sample: Int64Array
    prompt: Int64Array


def select_logits_rows(
    extend_seq_lens: Int32Array,
    logprob_start: Int32Array | None = None,
    *,
    static_stride: int | None = None,
) -> LogitsRows:
    """Rows whose logits an extend pass must compute: at least one per request.

    Decode and verification want every row and do not call this.

    Args:
        extend_seq_lens: ``[B]`` new tokens per request, at least 1 each.
        logprob_start: ``[B]`` first new token whose prediction is wanted too; −1 for none,
            and ``None`` for none in the whole batch.
        static_stride: Rows that each request occupies, used or not, where a graph gives
            every request the same room; ``None`` = packed.
    """
    lens = extend_seq_lens.astype(np.int64)
    starts = np.cumsum(lens) - lens
    if static_stride is not None:
        starts = np.arange(len(lens)) * static_stride
    wanted = np.zeros_like(lens)
    if logprob_start is not None:
        wanted = np.where(logprob_start < 0, 0, np.maximum(lens - logprob_start, 0))
    counts = np.maximum(wanted, 1)
    ends = np.cumsum(counts)
    first = starts + lens - counts
    rows = np.arange(counts.sum()) + np.repeat(first - (ends - counts), counts)
    prompt = np.flatnonzero(np.repeat(wanted > 0, counts))
    return LogitsRows(rows=rows, sample=ends - 1, prompt=prompt)
