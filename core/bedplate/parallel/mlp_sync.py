# SPDX-License-Identifier: Apache-2.0
"""Padding a rank's batch so that all ranks' rows fit one collective, and undoing it.

With data-parallel attention every rank has its own requests, yet dense layers work on all
rows together.  The plan is frozen and says everything; ``pad`` makes a new batch and
``unpad`` cuts the result back.  No batch, list or process-wide record is changed.

Shapes: B requests, T new tokens; B', T' after padding.
"""

from __future__ import annotations

__all__ = ["MLPSyncPlan", "PaddedCounts", "PaddingMode", "pad", "pad_counts", "plan_mlp_sync",
           "unpad"]  # fmt: skip

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch

from bedplate.batch.forward_batch import ExtendPart
from bedplate.batch.forward_mode import ForwardMode
from bedplate.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.batch.logits import LogitsOutput


class PaddingMode(Enum):
    """How far ranks pad their rows."""

    MAX_LEN = "max_len"
    """All to the largest count; rows are gathered."""
    SUM_LEN = "sum_len"
    """Each to its own aligned count; rows are summed into a zeroed buffer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedCounts:
    """What all ranks agree on.

    Attributes:
        mode: How far ranks pad.
        counts: Padded tokens of each attention group (of one, where only it gathers).
        buffer_len: Rows of the buffer in which they meet.
    """

    mode: PaddingMode
    counts: tuple[int, ...]
    buffer_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPSyncPlan:
    """One rank's padding for one pass.

    Attributes:
        padding: What all ranks agree on.
        start: First row of this rank in the buffer.
        num_tokens: T'.
        batch_size: B'.
        as_extend: A decode pass runs as an extend pass with one token per request, since
            another rank extends and the padding rows belong to no request.
        fill_value: Length that padding requests get; the attention's own.
        real_tokens: T.
    """

    padding: PaddedCounts
    start: int
    num_tokens: int
    batch_size: int
    as_extend: bool
    fill_value: int
    real_tokens: int


def pad_counts(
    global_num_tokens: Sequence[int], *, attn_tp_size: int, dp_size: int, graph: bool = False
) -> PaddedCounts:
    """Pad every group's token count; the argument is left as it is.

    Gathering moves ``max · dp_size`` rows, summing about twice the sum, and a tie is summed.

    Args:
        global_num_tokens: Tokens of each attention group, or this group's alone where only
            it gathers.
        attn_tp_size: Counts are aligned to it, so that rows split evenly; 0 stays 0.
        dp_size: Number of attention groups.
        graph: The pass replays a graph, which only knows equal counts.
    """
    aligned = tuple(-(-n // attn_tp_size) * attn_tp_size for n in global_num_tokens)
    largest, total = max(aligned), sum(aligned)
    if graph or 2 * total > largest * dp_size:
        return PaddedCounts(
            mode=PaddingMode.MAX_LEN,
            counts=(largest,) * len(aligned),
            buffer_len=largest * len(aligned),
        )
    return PaddedCounts(mode=PaddingMode.SUM_LEN, counts=aligned, buffer_len=total)


def plan_mlp_sync(
    batch: ForwardBatch,
    global_num_tokens: Sequence[int],
    *,
    dp_rank: int,
    dp_size: int,
    attn_tp_size: int = 1,
    is_extend_in_batch: bool = False,
    fill_value: int = 1,
    graph: bool = False,
) -> MLPSyncPlan:
    """Plan the padding of one rank's batch. Reads host facts of the batch only.

    Args:
        batch: This rank's batch; idle if it has no work.
        global_num_tokens: Tokens of each attention group, or this group's alone.
        dp_rank: This rank's group.
        dp_size: Number of groups.
        attn_tp_size: Ranks within a group.
        is_extend_in_batch: Some group extends.
        fill_value: ``AttentionBackend.seq_len_fill_value``.
        graph: The pass replays a graph.

    Raises:
        InternalError: The counts are not of this batch.
    """
    own = dp_rank if len(global_num_tokens) > 1 else 0
    _check_counts(batch, global_num_tokens, own, dp_size)
    padding = pad_counts(
        global_num_tokens, attn_tp_size=attn_tp_size, dp_size=dp_size, graph=graph
    )
    num_tokens = padding.counts[own]
    decode = batch.mode.is_decode()
    as_extend = decode and is_extend_in_batch and padding.mode is PaddingMode.MAX_LEN
    return MLPSyncPlan(
        padding=padding,
        start=sum(padding.counts[:own]),
        num_tokens=num_tokens,
        batch_size=num_tokens if decode and not as_extend else batch.batch_size,
        as_extend=as_extend,
        fill_value=fill_value,
        real_tokens=batch.num_tokens,
    )


def pad(batch: ForwardBatch, plan: MLPSyncPlan) -> ForwardBatch:
    """A new batch with T' tokens and B' requests; ``batch`` is unchanged.

    Padding tokens are 0, at position 0, and write to slot 0; padding requests are row 0 with
    the plan's fill length.
    """
    size, tokens, fill = plan.batch_size, plan.num_tokens, plan.fill_value
    table = batch.page_table
    return dataclasses.replace(
        batch,
        mode=ForwardMode.EXTEND if plan.as_extend else batch.mode,
        batch_size=size,
        input_ids=_pad_last(batch.input_ids, tokens),
        positions=_pad_last(batch.positions, tokens),
        out_cache_loc=_pad_last(batch.out_cache_loc, tokens),
        req_pool_indices=_pad_last(batch.req_pool_indices, size),
        seq_lens=_pad_last(batch.seq_lens, size, fill),
        seq_lens_cpu=_pad_last(batch.seq_lens_cpu, size, fill),
        page_table=None if table is None else _pad_last(table.T, size).T.contiguous(),
        extend=_one_token_each(batch) if plan.as_extend else batch.extend,
    )


def unpad(output: LogitsOutput, plan: MLPSyncPlan) -> LogitsOutput:
    """The real rows of a padded pass's result, as views.

    Rows of all tokens lose the padding at their end; rows of chosen tokens (at most T, and
    none of them padding) stay whole.
    """
    hidden = output.hidden_states
    return dataclasses.replace(
        output,
        next_token_logits=output.next_token_logits[: plan.real_tokens],
        hidden_states=None if hidden is None else hidden[: plan.real_tokens],
    )


def _pad_last(tensor: Tensor, length: int, fill: int = 0) -> Tensor:
    # The last axis is the one that counts tokens: three-row positions are [3, T].
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[-1]), value=fill)


def _one_token_each(batch: ForwardBatch) -> ExtendPart:
    return ExtendPart(
        seq_lens=torch.ones_like(batch.seq_lens),
        prefix_lens=batch.seq_lens - 1,
        start_loc=torch.arange(
            batch.batch_size, dtype=batch.seq_lens.dtype, device=batch.seq_lens.device
        ),
        seq_lens_cpu=torch.ones_like(batch.seq_lens_cpu),
        prefix_lens_cpu=batch.seq_lens_cpu - 1,
    )


def _check_counts(
    batch: ForwardBatch, global_num_tokens: Sequence[int], own: int, dp_size: int
) -> None:
    counts = tuple(global_num_tokens)
    if len(counts) not in (1, dp_size) or counts[own] != batch.num_tokens:
        raise InternalError(
            f"The token counts {counts} of {dp_size} attention groups do not describe a batch "
            f"of {batch.num_tokens} tokens in group {own}; the ranks disagree on this step",
            counts=counts,
            num_tokens=batch.num_tokens,
        )
