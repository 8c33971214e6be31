# SPDX-License-Identifier: Apache-2.0
"""A prompt that belongs to nobody: row 0, slot 0, and as many tokens as wanted.

For passes whose results nobody reads, before there is a scheduler.
"""

from __future__ import annotations

__all__ = ["dummy_prompt"]

import torch

from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
from bedplate.batch.forward_mode import ForwardMode


def dummy_prompt(count: int, device: torch.device, prefix: int = 0) -> ForwardBatch:
    """An extend pass of one request, ``prefix`` tokens behind it; logits of its last token."""
    new = torch.tensor([count], dtype=torch.int32)
    none = torch.zeros(1, dtype=torch.int32)
    on_device, nothing = new.to(device), none.to(device)
    return ForwardBatch(
        mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=torch.zeros(count, dtype=torch.int64, device=device),
        positions=torch.arange(prefix, prefix + count, device=device),
        req_pool_indices=nothing,
        seq_lens=on_device + prefix,
        seq_lens_cpu=new + prefix,
        out_cache_loc=torch.zeros(count, dtype=torch.int32, device=device),
        logits_rows=torch.tensor([count - 1], device=device),
        extend=ExtendPart(
            seq_lens=on_device,
            prefix_lens=nothing + prefix,
            start_loc=nothing,
            seq_lens_cpu=new,
            prefix_lens_cpu=none + prefix,
        ),
    )
