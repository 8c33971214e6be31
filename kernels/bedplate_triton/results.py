# SPDX-License-Identifier: Apache-2.0
"""Results of recorded passes, all of which lie in the same memory.

Graphs of one pool take turns in it, but a tensor that is kept takes its part out: logits of
every bucket would be gigabytes.  Called by the graph runners of backends.
"""

from __future__ import annotations

__all__ = ["borrow"]

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from bedplate.batch.logits import LogitsOutput


def borrow(output: LogitsOutput, interface: str) -> LogitsOutput:
    """The same results without owning their memory.

    The pool then gives it to the next graph too.  Results are valid until the next replay
    anyway, and the graphs keep the pool.

    Args:
        output: What a capture returned; its tensors lie in the pool and are to be dropped.
        interface: Name of the array interface by which torch takes over memory of the device:
            an attribute with shape, strides, type and address.
    """
    hidden, tokens = output.hidden_states, output.tokens
    return replace(
        output,
        next_token_logits=_alias(output.next_token_logits, interface),
        hidden_states=None if hidden is None else _alias(hidden, interface),
        tokens=None if tokens is None else _alias(tokens, interface),
    )


def _alias(tensor: Tensor, interface: str) -> Tensor:
    """A view of the tensor's memory that does not keep it."""
    size = tensor.element_size()
    facts = {
        "shape": tuple(tensor.shape),
        "strides": tuple(step * size for step in tensor.stride()),
        "typestr": "|i1" if size == 1 else f"<i{size}",
        "data": (tensor.data_ptr(), False),
        "version": 3,
    }
    memory = SimpleNamespace(**{interface: facts})
    return torch.as_tensor(memory, device=tensor.device).view(tensor.dtype)
