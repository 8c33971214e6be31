# SPDX-License-Identifier: Apache-2.0
"""Builds the arrays of an extend or mixed pass from its chunks. Pure.

Decode passes need no building: ``DecodeBatch`` keeps their arrays.
"""

from __future__ import annotations

__all__ = ["extend_batch", "planned_extend"]

from typing import TYPE_CHECKING

import numpy as np

from bedplate.batch.forward_mode import ForwardMode
from bedplate.batch.schedule_batch import ScheduleBatch, TableUpdate
from bedplate.scheduling.planned import PlannedStep

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from bedplate.scheduling.decode_batch import DecodeBatch
    from bedplate.scheduling.planned import Chunk
    from bedplate.scheduling.table import RequestTable

    Int32Array = npt.NDArray[np.int32]
    Int64Array = npt.NDArray[np.int64]


def extend_batch(
    chunks: Sequence[Chunk], table: RequestTable, riders: DecodeBatch | None, *, overlap: bool
) -> ScheduleBatch:
    """The pass that computes ``chunks``, with the decode batch behind them if given.

    Args:
        chunks: At least one.
        table: Holds their tokens.
        riders: Decode members that ride along, already advanced by this step.
        overlap: The riders' input tokens may not have reached the host.
    """
    starts = _int32(c.start for c in chunks)
    ends = _int32(c.end for c in chunks)
    rows = _int32(c.row for c in chunks)
    ids = [table.tokens[c.row, c.start : c.end].astype(np.int64) for c in chunks]
    positions = [np.arange(c.start, c.end) for c in chunks]
    slots = [c.slots for c in chunks]
    sample = np.array([c.last for c in chunks])
    score = _int32(c.score_from for c in chunks)
    following = [_following(c, table) for c in chunks]
    on_device = None
    if riders is not None:
        n = riders.size
        rows = np.concatenate([rows, riders.rows])
        starts = np.concatenate([starts, riders.seq_lens - 1])
        ends = np.concatenate([ends, riders.seq_lens])
        ids.append(riders.input_ids)
        positions.append(riders.positions)
        slots.append(riders.slots)
        sample = np.concatenate([sample, np.ones(n, np.bool_)])
        score = np.concatenate([score, np.full(n, -1, np.int32)])
        following += [-1] * n
        if overlap:
            on_device = np.arange(len(rows)) >= len(chunks)
    scored = bool((score >= 0).any())
    return ScheduleBatch(
        mode=ForwardMode.EXTEND if riders is None else ForwardMode.MIXED,
        req_pool_indices=rows,
        seq_lens=ends,
        input_ids=np.concatenate(ids),
        positions=np.concatenate(positions),
        out_cache_loc=np.concatenate(slots),
        extend_seq_lens=ends - starts,
        extend_prefix_lens=starts,
        token_on_device=on_device,
        sample=None if sample.all() else sample,
        prompt_logprob_start=score if scored else None,
        next_prompt_token=np.array(following, np.int64) if scored else None,
        table_update=_table_update(chunks),
    )


def planned_extend(
    batch: ScheduleBatch,
    chunks: Sequence[Chunk],
    table: RequestTable,
) -> PlannedStep:
    """The record of a pass made by ``extend_batch``."""
    rows = batch.req_pool_indices.astype(np.int64)
    sampled = batch.sample if batch.sample is not None else np.True_
    ends = np.flatnonzero((table.max_len[rows] - 1 <= batch.seq_lens) & sampled)
    return PlannedStep(
        mode=batch.mode,
        rows=rows,
        serials=table.serial[rows],
        known=batch.seq_lens + 1,
        flat=rows * table.stride + batch.seq_lens,
        numbers=table.number[rows],
        epoch=-1,
        ending=ends if len(ends) else None,
        num_tokens=batch.num_tokens,
        chunks=tuple(chunks),
    )


def _table_update(chunks: Sequence[Chunk]) -> TableUpdate | None:
    # A request's first chunk since its admission begins where its cached prefix ends.
    joined = [c for c in chunks if c.start and c.start == len(c.request.borrowed)]
    if not joined:
        return None
    lengths = [c.start for c in joined]
    return TableUpdate(
        rows=np.repeat(_int32(c.row for c in joined), lengths),
        columns=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        slots=np.concatenate([c.request.borrowed for c in joined]),
    )


def _following(chunk: Chunk, table: RequestTable) -> int:
    """The prompt token after a chunk, or −1 at the end of the prompt."""
    if chunk.end >= chunk.request.prompt_len:
        return -1
    return int(table.tokens[chunk.row, chunk.end])


def _int32(values: object) -> Int32Array:
    return np.fromiter(values, np.int32)  # type: ignore[call-overload, no-any-return]
