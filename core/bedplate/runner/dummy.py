# SPDX-License-Identifier: Apache-2.0
"""A prompt that belongs to nobody: row 0, slot 0, and as many tokens as wanted.

For passes whose results nobody reads, before there is a scheduler.
"""

from __future__ import annotations

__all__ = ["dummy_prompt"]

import torch

from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
from bedplate.batch.forward_mode import ForwardMode


def dummy_prompt(count: int, device: torch.device) -> ForwardBatch:
    """An extend pass of one request without a prefix; the logits of its last token."""
    length = torch.tensor([count], dtype=torch.int32)
    none = torch.zeros(1, dtype=torch.int32)
    on_device = length.to(device)
    nothing = none.to(device)
    return ForwardBatch(
        mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=torch.zeros(count, dtype=torch.int64, device=device),
        positions=torch.arange(count, device=device),
        req_pool_indices=nothing,
        seq_lens=on_device,
        seq_lens_cpu=length,
        out_cache_loc=torch.zeros(count, dtype=torch.int32, device=device),
        logits_rows=torch.tensor([count - 1], device=device),
        extend=ExtendPart(
            seq_lens=on_device,
            prefix_lens=nothing,
            start_loc=nothing,
            seq_lens_cpu=length,
            prefix_lens_cpu=none,
        ),
    )
