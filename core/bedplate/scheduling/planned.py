# SPDX-License-Identifier: Apache-2.0
"""What the scheduler remembers of a pass until its tokens arrive, and what it reports then."""

from __future__ import annotations

__all__ = ["Applied", "Chunk", "PlannedStep"]

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bedplate.batch.forward_mode import ForwardMode
    from bedplate.scheduling.request import Request

    Int32Array = npt.NDArray[np.int32]
    Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """New tokens of one request in an extend pass.

    Attributes:
        request: Whose.
        row: Its row.
        start: Tokens that were there before.
        end: Tokens that are there afterwards.
        slots: ``[end − start]`` int32 slots of the new ones.
        score_from: First new token whose prediction is wanted as a prompt logprob; −1 none.
        last: The prompt is complete and a token is sampled.
    """

    request: Request
    row: int
    start: int
    end: int
    slots: Int32Array
    score_from: int
    last: bool


@dataclass(slots=True, kw_only=True)
class PlannedStep:
    """One pass in flight. Arrays are the record's own; B as in its batch.

    Attributes:
        mode: Kind of pass.
        rows: ``[B]`` int64 request rows.
        serials: ``[B]`` int64 serials of the rows when planned.
        known: ``[B]`` int32 tokens that are known once a sampled token is applied.
        flat: ``[B]`` int64 place of the sampled token in the flat token table.
        numbers: ``[B]`` int64 arrival numbers.
        epoch: Of the decode batch, if the pass is exactly that batch; else −1.
        ending: ``[n]`` int64 entries that reach their length with this pass, or ``None``.
        chunks: Of an extend pass; entry ``i`` of the batch is ``chunks[i]``.
        num_tokens: T.
    """

    mode: ForwardMode
    rows: Int64Array
    serials: Int64Array
    known: Int32Array
    flat: Int64Array
    numbers: Int64Array
    epoch: int
    ending: Int64Array | None
    num_tokens: int
    chunks: tuple[Chunk, ...] = ()


@dataclass(slots=True, kw_only=True)
class Applied:
    """What one pass changed.

    Attributes:
        planned: The pass.
        numbers: ``[n]`` arrival numbers of the requests that got a token.
        token_ids: ``[n]`` int64 their tokens.
        finished: Requests that ended.
    """

    planned: PlannedStep
    numbers: Int64Array
    token_ids: Int64Array
    finished: list[Request] = field(default_factory=list)
