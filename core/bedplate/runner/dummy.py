# SPDX-License-Identifier: Apache-2.0
"""A prompt that belongs to nobody: row 0, slot 0, and as many tokens as wanted.

For passes whose results nobody reads, before there is a scheduler.
"""

from __future__ import annotations

__all__ = ["dummy_prompt"]

import torch

from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
from bedplate.batch.forward_mode import ForwardMode


def dummy_prompt(
    count: int, device: torch.device, prefix: int = 0, requests: int = 1
) -> ForwardBatch:
    """An extend pass, ``prefix`` tokens behind every request; logits of the last token.

    Args:
        count: New tokens; all but one are the first request's.
        device: Place of the tensors.
        prefix: Cached tokens of each request.
        requests: How many; at most ``count`` of them are real.
    """
    requests = min(requests, count)
    new = torch.ones(requests, dtype=torch.int32)
    new[0] = count - requests + 1
    none = torch.zeros(requests, dtype=torch.int32)
    on_device, nothing = new.to(device), none.to(device)
    return ForwardBatch(
        mode=ForwardMode.EXTEND,
        batch_size=requests,
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
            start_loc=on_device.cumsum(0, dtype=torch.int32) - on_device,
            seq_lens_cpu=new,
            prefix_lens_cpu=none + prefix,
        ),
    )
