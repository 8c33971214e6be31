# SPDX-License-Identifier: Apache-2.0
"""ScheduleBatch: the host's half of one pass, as the scheduler writes it.

Numpy arrays only.  ``batch.staging`` packs it into one host buffer, and the device's half,
``ForwardBatch``, is cut out of the copy.  The scheduler may reuse these arrays in the next
step: whoever needs them later copies.

Shapes: B requests, T new tokens, R rows of logits.
"""

from __future__ import annotations

__all__ = ["ScheduleBatch", "TableUpdate"]

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bedplate.batch.forward_mode import CaptureHiddenMode, ForwardMode

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Int32Array = npt.NDArray[np.int32]
    Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableUpdate:
    """Slots of cached prefixes, to be written into ``req_to_token`` before the pass.

    New tokens need no update: their place follows from positions and ``out_cache_loc``.

    Attributes:
        rows: ``[n]`` request rows.
        columns: ``[n]`` positions.
        slots: ``[n]`` slots.
    """

    rows: Int32Array
    columns: Int32Array
    slots: Int32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleBatch:
    """What the scheduler decided for one pass.

    Attributes:
        mode: Kind of pass.
        req_pool_indices: ``[B]`` int32 rows of ``req_to_token``; never 0.
        seq_lens: ``[B]`` int32 length after this pass.
        input_ids: ``[T]`` int64; ignored where the token is still on the device.
        positions: ``[T]`` int64.
        out_cache_loc: ``[T]`` int32 slots of the new tokens.
        extend_seq_lens: ``[B]`` int32 new tokens per request; ``None`` in decode.
        extend_prefix_lens: ``[B]`` int32 cached tokens per request; ``None`` in decode.
        token_on_device: ``[B]`` bool: this request's (single) input token is the one sampled
            last for its row and may not have reached the host; ``None`` = no request.
        sample: ``[B]`` bool: a token is sampled (not so for an unfinished prompt chunk);
            ``None`` = all.
        prompt_logprob_start: ``[B]`` int32 first new token whose prediction is wanted (as
            prompt logprobs), −1 for none; ``None`` = none for all.
        next_prompt_token: ``[B]`` int64 prompt token that follows this pass's last one, −1
            where the prompt ends; needed only beside ``prompt_logprob_start``.
        table_update: Cached prefixes that joined since the last pass.
        capture_hidden: Which hidden states to keep.
    """

    mode: ForwardMode
    req_pool_indices: Int32Array
    seq_lens: Int32Array
    input_ids: Int64Array
    positions: Int64Array
    out_cache_loc: Int32Array
    extend_seq_lens: Int32Array | None = None
    extend_prefix_lens: Int32Array | None = None
    token_on_device: npt.NDArray[np.bool_] | None = None
    sample: npt.NDArray[np.bool_] | None = None
    prompt_logprob_start: Int32Array | None = None
    next_prompt_token: Int64Array | None = None
    table_update: TableUpdate | None = None
    capture_hidden: CaptureHiddenMode = CaptureHiddenMode.NULL

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.seq_lens)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)
