# SPDX-License-Identifier: Apache-2.0
"""Who computes which rows: ranks, attention groups and which passes gather.

Pure functions over one frozen record, so that every rank comes to the same answer without
asking, and a test needs no process group.
"""

from __future__ import annotations

__all__ = [
    "AttentionLayout",
    "ParallelLayout",
    "attention_layout",
    "enable_num_token_non_padded",
    "local_non_padded_tokens",
    "needs_attn_tp_gather",
    "needs_gathered_buffer",
    "needs_mlp_sync",
    "needs_mlp_tp_gather",
]

from dataclasses import dataclass

from bedplate.errors import ConfigError, InternalError


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """How the ranks of one model replica are arranged.

    Attributes:
        tp_size: Ranks that share every layer.
        dp_size: Groups among them that attend to different requests.
        dp_attention: Whether those groups exist at all.
        dp_lm_head: The vocabulary is split within an attention group only.
        moe_ep_size: Ranks that share the experts.
        moe_all_to_all: Experts exchange tokens themselves.
        moe_dense_tp: Ranks that share a dense layer of an expert model: 1, or ``None`` for
            all of them.

    Raises:
        ConfigError: A size is below 1, the groups do not divide the ranks, or
            ``moe_dense_tp`` is neither 1 nor ``None``.
    """

    tp_size: int = 1
    dp_size: int = 1
    dp_attention: bool = False
    dp_lm_head: bool = False
    moe_ep_size: int = 1
    moe_all_to_all: bool = False
    moe_dense_tp: int | None = None

    def __post_init__(self) -> None:
        _check_sizes(self.tp_size, self.dp_size)
        if self.moe_dense_tp not in (None, 1):
            raise ConfigError(
                f"moe_dense_tp is {self.moe_dense_tp}; dense layers of an expert model run on "
                "1 rank or on all of them. Set it to 1 or leave it out",
                moe_dense_tp=self.moe_dense_tp,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayout:
    """One rank's place when attention is data-parallel.

    Attributes:
        tp_size: Ranks that share one request's attention.
        tp_rank: Place among them.
        dp_rank: Which group; decides which requests.
    """

    tp_size: int
    tp_rank: int
    dp_rank: int


def attention_layout(tp_rank: int, tp_size: int, dp_size: int) -> AttentionLayout:
    """Place of ``tp_rank`` when ``tp_size`` ranks form ``dp_size`` attention groups.

    Raises:
        ConfigError: The groups do not divide the ranks, or there is no such rank.
    """
    _check_sizes(tp_size, dp_size)
    if not 0 <= tp_rank < tp_size:
        raise ConfigError(
            f"Rank {tp_rank} does not exist among {tp_size}; ranks count from 0",
            tp_rank=tp_rank,
            tp_size=tp_size,
        )
    size = tp_size // dp_size
    return AttentionLayout(tp_size=size, tp_rank=tp_rank % size, dp_rank=tp_rank // size)


def needs_mlp_tp_gather(layout: ParallelLayout) -> bool:
    """Whether the rows of all attention groups meet before a dense layer."""
    # A dense layer on 1 rank never spans attention groups, so its size adds no condition.
    return layout.dp_attention and not (
        layout.moe_dense_tp == 1 and layout.dp_lm_head and layout.moe_all_to_all
    )


def needs_attn_tp_gather(layout: ParallelLayout) -> bool:
    """Whether the rows split within one attention group meet again."""
    splits_rows = layout.moe_all_to_all or layout.moe_dense_tp == 1
    return splits_rows and (not layout.dp_attention or layout.dp_size < layout.tp_size)


def needs_gathered_buffer(layout: ParallelLayout) -> bool:
    """Whether any rows are gathered, so that graphs need a buffer for them."""
    return needs_mlp_tp_gather(layout) or needs_attn_tp_gather(layout)


def needs_mlp_sync(layout: ParallelLayout) -> bool:
    """Whether ranks agree on token counts before each pass."""
    return layout.dp_attention or needs_gathered_buffer(layout)


def enable_num_token_non_padded(layout: ParallelLayout) -> bool:
    """Whether experts must know how many rows are real, to leave padding out."""
    return layout.moe_ep_size > 1


def local_non_padded_tokens(
    num_tokens: int,
    *,
    padded_batch_size: int,
    attn_tp_size: int,
    attn_tp_rank: int,
    tokens_per_request: int = 1,
) -> int:
    """How many of ``num_tokens`` real rows fall to one rank of an attention group.

    The padded rows are dealt out in equal, contiguous shares.

    Raises:
        InternalError: The shares are not equal; captured sizes are aligned to prevent it.
    """
    if padded_batch_size % attn_tp_size:
        raise InternalError(
            f"A padded batch of {padded_batch_size} cannot be dealt to {attn_tp_size} ranks "
            "in equal shares; its size should have been aligned",
            padded_batch_size=padded_batch_size,
            attn_tp_size=attn_tp_size,
        )
    share = padded_batch_size // attn_tp_size * tokens_per_request
    return min(max(num_tokens - share * attn_tp_rank, 0), share)


def _check_sizes(tp_size: int, dp_size: int) -> None:
    if tp_size < 1 or dp_size < 1 or tp_size % dp_size:
        raise ConfigError(
            f"{tp_size} tensor-parallel ranks cannot form {dp_size} attention groups of equal "
            "size. Choose a number of groups, at least 1, that divides the ranks",
            tp_size=tp_size,
            dp_size=dp_size,
        )
