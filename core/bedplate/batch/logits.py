# SPDX-License-Identifier: Apache-2.0
"""LogitsOutput: what a forward pass returns on the last pipeline stage.

Separate from ``forward_batch`` because models make it and the sampler reads it.

Shapes: R rows of logits, T new tokens, V vocabulary.
"""

from __future__ import annotations

__all__ = ["LogitsOutput"]

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsOutput:
    """Logits of the wanted rows, and hidden states where they were kept.

    After a graph's replay the tensors are views of the graph's memory and hold until the
    next replay.

    Attributes:
        next_token_logits: ``[R, V]`` device.
        hidden_states: ``[R, h]`` (last tokens) or ``[T, h]`` (all tokens) device; ``None``
            unless ``ForwardBatch.capture_hidden`` asked for them.
        tokens: ``[R]`` int64 device, where the pass sampled them itself.
    """

    next_token_logits: Tensor
    hidden_states: Tensor | None = None
    tokens: Tensor | None = None
