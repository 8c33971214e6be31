# SPDX-License-Identifier: Apache-2.0
"""Memory of recorded passes, pretended on the host."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

_AS_TENSOR = torch.as_tensor


class Pool:
    """Parts of one block of memory; what is dropped gives its part to who comes next.

    Attributes:
        most_bytes: Taken at a time, so far.
    """

    def __init__(self, nbytes=1 << 16):
        self._block = np.zeros(nbytes, np.uint8)
        self._taken = {}
        self.most_bytes = 0

    def place(self, tensor):
        """The same numbers in the pool, at the first place that is free."""
        begin, size = 0, tensor.nbytes
        for other, end in sorted(self._taken.items()):
            if begin + size <= other:
                break
            begin = end
        part = self._block[begin : begin + size]
        self._taken[begin] = begin + size
        self.most_bytes = max(self.most_bytes, sum(e - b for b, e in self._taken.items()))
        weakref.finalize(part, self._taken.pop, begin)  # torch keeps it with the last view
        placed = torch.from_numpy(part).view(tensor.dtype).view(tensor.shape)
        return placed.copy_(tensor)

    def place_results(self, output):
        """All tensors of a pass's output in the pool."""
        names = ("next_token_logits", "hidden_states", "tokens")
        tensors = {name: getattr(output, name) for name in names}
        return replace(
            output, **{n: None if t is None else self.place(t) for n, t in tensors.items()}
        )


def as_tensor(data, *arguments, **options):
    """``torch.as_tensor``, which takes over memory of the host as if it were a device's."""
    facts = getattr(data, "__cuda_array_interface__", None)
    if facts is None:
        return _AS_TENSOR(data, *arguments, **options)
    return torch.from_numpy(np.asarray(SimpleNamespace(__array_interface__=facts)))
