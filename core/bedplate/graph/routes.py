# SPDX-License-Identifier: Apache-2.0
"""From a batch of some size to a captured graph, and back to that batch's rows.

Apart from the runner because it is pure slicing: a graph computes padded rows, and possibly
more hidden states than were asked for.
"""

from __future__ import annotations

__all__ = ["Captured", "Route"]

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bedplate.batch.forward_mode import CaptureHiddenMode
from bedplate.batch.logits import LogitsOutput

if TYPE_CHECKING:
    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.graph.keys import ShapeKey


@dataclass(frozen=True, slots=True)
class Captured:
    """One graph with the batch it reads and the output it writes."""

    key: ShapeKey
    graph: Any
    batch: ForwardBatch
    output: LogitsOutput


class Route:
    """A graph for batches of one size, and the part of its output that they see."""

    __slots__ = ("_hidden_rows", "_token_rows", "captured", "num_requests", "output")

    def __init__(
        self,
        captured: Captured,
        num_requests: int,
        hidden: CaptureHiddenMode,
        tokens_per_request: int,
    ) -> None:
        self.captured = captured
        self.num_requests = num_requests
        self._token_rows = slice(num_requests * tokens_per_request)
        self._hidden_rows = _hidden_rows(
            captured.key.hidden_mode, hidden, num_requests, tokens_per_request
        )
        self.output = self.cut(captured.output)

    def cut(self, output: LogitsOutput) -> LogitsOutput:
        """Views of the real rows of a padded output."""
        hidden, rows = output.hidden_states, self._hidden_rows
        tokens = output.tokens
        return LogitsOutput(
            next_token_logits=output.next_token_logits[self._token_rows],
            hidden_states=None if hidden is None or rows is None else hidden[rows],
            tokens=None if tokens is None else tokens[self._token_rows],
        )


def _hidden_rows(
    kept: CaptureHiddenMode, wanted: CaptureHiddenMode, num_requests: int, tokens: int
) -> slice | None:
    """Rows of the kept hidden states that were asked for; a higher mode serves a lower."""
    if wanted is CaptureHiddenMode.NULL:
        return None
    if kept is CaptureHiddenMode.LAST:
        return slice(num_requests)
    if wanted is CaptureHiddenMode.LAST:
        return slice(tokens - 1, num_requests * tokens, tokens)
    return slice(num_requests * tokens)
