# SPDX-License-Identifier: Apache-2.0
"""Windows and chunks, learned by asking a mask function questions at points.

Transformers describes a mask by a closure ``visible(batch, head, query, key)``.  Some
families state their window nowhere else.  About a hundred scalar questions tell causality,
window and chunk, and random points near the borders confirm the answer.
"""

from __future__ import annotations

__all__ = ["MaskFacts", "MaskFunction", "UnreadableMaskError", "ask_mask"]

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FAR_POSITION = 1 << 20
"""A query so far from the start that every real window or chunk ends before key 0."""

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class UnreadableMaskError(Exception):
    """The closure cannot be asked, or is none of: causal, full, window, chunk."""


@dataclass(frozen=True, slots=True)
class MaskFacts:
    """Which keys a query sees, in the words of ``AttentionCallSpec``."""

    causal: bool
    window: int | None = None
    chunk: int | None = None

    def visible(self, query: int, key: int) -> bool:
        """Whether a query at one position sees a key at another."""
        if self.causal and key > query:
            return False
        if self.window is not None and key <= query - self.window:
            return False
        return self.chunk is None or key // self.chunk == query // self.chunk


def ask_mask(mask: MaskFunction) -> MaskFacts:
    """What ``mask`` computes.

    Args:
        mask: Closure over (batch, head, query, key), each a 0-D int64 tensor on the host.

    Raises:
        UnreadableMaskError: It failed, or answers as no mask that we can describe.
    """
    zero = torch.zeros((), dtype=torch.int64)

    def ask(query: int, key: int) -> bool:
        return bool(mask(zero, zero, torch.tensor(query), torch.tensor(key)))

    try:
        facts = _describe(ask)
        _confirm(ask, facts)
    except UnreadableMaskError:
        raise
    except Exception as error:
        raise UnreadableMaskError(f"asking failed: {type(error).__name__}: {error}") from error
    return facts


def _describe(ask: Callable[[int, int], bool]) -> MaskFacts:
    causal = not ask(FAR_POSITION, FAR_POSITION + 1)
    if ask(FAR_POSITION, 0):
        return MaskFacts(causal)
    queries = [FAR_POSITION + step for step in (0, 1, 17, 4099)]
    reach = [_reach(ask, query) for query in queries]
    if len(set(reach)) == 1:
        return MaskFacts(causal, window=reach[0] + 1)
    start = queries[0] - reach[0]
    # The chunk ends at the first query that no longer sees the chunk's first key.
    chunk = _first_false(lambda size: ask(start + size, start), FAR_POSITION)
    return MaskFacts(causal, chunk=chunk)


def _reach(ask: Callable[[int, int], bool], query: int) -> int:
    """Largest distance back that ``query`` sees."""
    return _first_false(lambda distance: ask(query, query - distance), query) - 1


def _first_false(holds: Callable[[int], bool], high: int) -> int:
    """Smallest n in 1 … high for which ``holds(n)`` fails, ``holds`` being monotone."""
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


def _confirm(ask: Callable[[int, int], bool], facts: MaskFacts) -> None:
    chance = random.Random(0)
    border = facts.window or facts.chunk or 64
    for base in (border, FAR_POSITION):
        for _ in range(24):
            query = base + chance.randrange(2 * border)
            key = max(0, query + chance.choice((0, 1, -1, -border, 1 - border, -border - 1)))
            if facts.causal and key > query:
                continue
            if ask(query, key) != facts.visible(query, key):
                raise UnreadableMaskError(
                    f"it is neither a window nor a chunk: query {query}, key {key}"
                )
