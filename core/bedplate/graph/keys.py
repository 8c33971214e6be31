# SPDX-License-Identifier: Apache-2.0
"""What identifies a graph, why none may fit a batch, and the counts of both.

Apart from the runner because backends and statistics read these without its machinery.
"""

from __future__ import annotations

__all__ = ["GraphStats", "Refusal", "ShapeKey"]

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from bedplate.batch.forward_mode import CaptureHiddenMode, ForwardMode


class Refusal(StrEnum):
    """Why no graph can serve a batch; the values are stable and go into statistics."""

    NOT_CAPTURED = "not-captured"
    """No graphs exist: before ``capture`` or after ``release``."""
    MODE = "mode"
    """The batch's mode is not the one that was captured."""
    EMPTY = "empty"
    """There are no requests."""
    TOO_LARGE = "too-large"
    """More requests than the largest bucket."""
    TOKENS_PER_REQUEST = "tokens-per-request"
    """Another number of new tokens than K per request."""
    LOGITS_ROWS = "logits-rows"
    """Only some rows of logits are wanted; a graph computes all."""
    PAGE_TABLE = "page-table"
    """The batch has a page table and the graph none, or the reverse."""
    HIDDEN_MODE = "hidden-mode"
    """Hidden states are wanted that no graph keeps."""
    HOST_INTEGERS = "host-integers"
    """Integers that reach kernels differ from those baked into the graphs."""
    CAPTURE_FAILED = "capture-failed"
    """The bucket's graph could not be captured at start-up."""
    PADDING = "padding"
    """The graphs that could serve it have so many more tokens that an eager pass is sooner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeKey:
    """Everything that is baked into one graph.

    Attributes:
        mode: Kind of pass.
        batch_size: Requests, padding included.
        hidden_mode: Hidden states that the graph keeps.
        host_ints: Python integers that reach kernels, from ``AttentionBackend.graph_key``.
        num_tokens: New tokens, padding included, where they do not follow from the requests.
    """

    mode: ForwardMode
    batch_size: int
    hidden_mode: CaptureHiddenMode = CaptureHiddenMode.NULL
    host_ints: tuple[int, ...] = ()
    num_tokens: int | None = None

    def __str__(self) -> str:
        if self.num_tokens is None:
            return f"{self.batch_size} requests"
        return f"{self.num_tokens} tokens"


@dataclass(slots=True)
class GraphStats:
    """Counts since the runner was made.

    Attributes:
        replays: Bucket → replays.
        refusals: Reason → batches that ``can_run`` turned away.
    """

    replays: Counter[int] = field(default_factory=Counter)
    refusals: Counter[Refusal] = field(default_factory=Counter)
