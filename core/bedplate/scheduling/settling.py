# SPDX-License-Identifier: Apache-2.0
"""Takes the result of a pass into the table and ends the requests that have ended.

A decode pass whose members are still the same costs a few array operations; everything else
goes the general way, which knows that rows may have changed hands since the pass was planned.

Shapes: B entries of the pass, W stop columns.
"""

from __future__ import annotations

__all__ = ["apply_output", "fail_step"]

import time
from typing import TYPE_CHECKING

import numpy as np

from bedplate.scheduling.planned import Applied

if TYPE_CHECKING:
    import numpy.typing as npt

    from bedplate.batch.step import StepOutput
    from bedplate.scheduling.planned import Chunk, PlannedStep
    from bedplate.scheduling.request import FinishReason
    from bedplate.scheduling.roster import Roster

    Int64Array = npt.NDArray[np.int64]
    BoolArray = npt.NDArray[np.bool_]


def apply_output(roster: Roster, planned: PlannedStep, output: StepOutput) -> Applied:
    """Take in the tokens of a pass."""
    if planned.epoch == roster.decode.epoch and not output.errors and not output.logprobs:
        return _apply_decode(roster, planned, output.next_token_ids)
    return _apply_any(roster, planned, output)


def fail_step(roster: Roster, planned: PlannedStep, error: str) -> Applied:
    """The pass raised: its requests end, the others are unharmed."""
    nothing = planned.numbers[:0]
    applied = Applied(planned=planned, numbers=nothing, token_ids=nothing)
    for row in planned.rows[_still_theirs(roster, planned)]:
        _end(roster, applied, row, "error", error=error)
    return applied


def _apply_decode(roster: Roster, planned: PlannedStep, tokens: Int64Array) -> Applied:
    """The whole decode batch, unchanged since: no look at any single request."""
    table, decode = roster.table, roster.decode
    table.flat_tokens[planned.flat] = tokens
    table.known_len[planned.rows] = planned.known
    decode.input_ids[:] = tokens
    applied = Applied(planned=planned, numbers=planned.numbers, token_ids=tokens)
    hit = decode.stops[0] == tokens
    for column in decode.stops[1:]:
        hit |= column == tokens
    if planned.ending is not None or hit.any():
        _end_all(roster, applied, planned.rows, hit, planned.ending)
    return applied


def _apply_any(roster: Roster, planned: PlannedStep, output: StepOutput) -> Applied:
    table = roster.table
    valid = _still_theirs(roster, planned)
    failed = [(i, message) for i, message in (output.errors or {}).items() if valid[i]]
    valid[[i for i, _ in failed]] = False
    got = np.flatnonzero(valid & (output.next_token_ids >= 0))
    rows, tokens = planned.rows[got], output.next_token_ids[got]
    table.flat_tokens[planned.flat[got]] = tokens
    table.known_len[rows] = planned.known[got]
    roster.decode.feed(rows, tokens)
    applied = Applied(planned=planned, numbers=planned.numbers[got], token_ids=tokens)
    _record_logprobs(roster, planned, output, valid)
    for i, message in failed:
        _end(roster, applied, planned.rows[i], "error", error=message)
    for chunk, well in zip(planned.chunks, valid, strict=False):
        if well and chunk.last:
            _settle_prompt(roster, chunk)
    hit = (table.stops[:, rows] == tokens).any(axis=0)
    ending = None
    if planned.ending is not None:
        ending = np.flatnonzero(np.isin(got, planned.ending))
    _end_all(roster, applied, rows, hit, ending)
    return applied


def _still_theirs(roster: Roster, planned: PlannedStep) -> BoolArray:
    """``[B]`` entries whose row has not changed hands since the pass was planned."""
    same: BoolArray = roster.table.serial[planned.rows] == planned.serials
    return same


def _record_logprobs(
    roster: Roster, planned: PlannedStep, output: StepOutput, valid: BoolArray
) -> None:
    owners = roster.table.owners
    for i, entry in (output.logprobs or {}).items():
        request = owners[planned.rows[i]]
        if valid[i] and request is not None:
            request.logprobs.append(entry)
    for i, entries in (output.prompt_logprobs or {}).items():
        request = owners[planned.rows[i]]
        if valid[i] and request is not None:
            wanted = request.prompt_len - 1 - len(request.prompt_logprobs)
            request.prompt_logprobs += entries[:wanted]


def _settle_prompt(roster: Roster, chunk: Chunk) -> None:
    """A prompt is computed and a token came out: share the pages."""
    request, table = chunk.request, roster.table
    request.ready = True
    if not request.first_token_s:
        request.first_token_s = time.monotonic()
    tokens = table.tokens[chunk.row, : chunk.end]
    roster.slots.publish(request, tokens, table.slots_of(chunk.row, 0, chunk.end))
    roster.blocked = False


def _end_all(
    roster: Roster,
    applied: Applied,
    rows: Int64Array,
    hit: BoolArray,
    ending: Int64Array | None,
) -> None:
    """End the entries that hit a stop token, then those that reached their length."""
    for i in np.flatnonzero(hit):
        request = roster.table.owners[rows[i]]
        if request is not None and roster.table.known_len[rows[i]] >= request.min_len:
            _end(roster, applied, rows[i], "stop", int(applied.token_ids[i]))
    for i in () if ending is None else ending:
        _end(roster, applied, rows[i], "length")


def _end(
    roster: Roster,
    applied: Applied,
    row: np.int64,
    reason: FinishReason,
    stop_reason: int | None = None,
    *,
    error: str = "",
) -> None:
    request = roster.table.owners[row]
    if request is not None:
        roster.finish(request, reason, stop_reason, error)
        applied.finished.append(request)
