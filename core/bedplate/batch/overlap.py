# SPDX-License-Identifier: Apache-2.0
"""Where to cut a batch in two, so that one half computes while the other communicates.

Host integers only.  The scheduler plans, the runner builds the two children; ``None`` means
that a batch is too small to give both of them a token.
"""

from __future__ import annotations

__all__ = [
    "OverlapChild",
    "OverlapPlan",
    "plan_overlap",
    "split_decode",
    "split_extend",
    "split_non_padded",
]

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from bedplate.batch.forward_mode import ForwardMode
from bedplate.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapChild:
    """One half, as ranges of the whole batch.

    Attributes:
        requests: First request and the one after the last.
        tokens: First token and the one after the last.
        extend_seq_lens: New tokens of its requests; empty in decode.
        prefix_growth: Tokens of its first request that the other half computes, to be
            added to that request's prefix.
    """

    requests: tuple[int, int]
    tokens: tuple[int, int]
    extend_seq_lens: tuple[int, ...] = ()
    prefix_growth: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapPlan:
    """Both halves.

    Attributes:
        seq_split: First request that is (also) in the second half; 0 is a legal split.
        token_split: First token of the second half.
        children: The halves. They share request ``seq_split`` iff ``two_chunk``.
        two_chunk: That request is cut within its tokens.
    """

    seq_split: int
    token_split: int
    children: tuple[OverlapChild, OverlapChild]
    two_chunk: bool = False


def plan_overlap(
    mode: ForwardMode,
    *,
    batch_size: int,
    extend_seq_lens: Sequence[int] = (),
    tokens_per_request: int = 1,
    balance_threshold: float = 0.48,
) -> OverlapPlan | None:
    """Split a batch of any mode that can be split; arguments as below.

    Raises:
        UnsupportedError: Passes of this mode cannot be split.
        ConfigError: See ``split_extend``.
    """
    if mode.is_idle():
        return _plan(0, 0, batch_size=0, num_tokens=0)
    if mode.is_decode() or mode.is_target_verify():
        return split_decode(batch_size, tokens_per_request=tokens_per_request)
    if mode is ForwardMode.EXTEND:
        return split_extend(extend_seq_lens, balance_threshold=balance_threshold)
    raise UnsupportedError(
        f"Two-batch overlap cannot split a pass of mode {mode.name}; it can split EXTEND, "
        "DECODE, TARGET_VERIFY and IDLE. Run this pass whole",
        mode=mode,
    )


def split_decode(batch_size: int, *, tokens_per_request: int = 1) -> OverlapPlan | None:
    """Halve a pass in which every request has the same number of tokens."""
    split = batch_size // 2
    if split == 0:
        return None
    return _plan(
        split,
        split * tokens_per_request,
        batch_size=batch_size,
        num_tokens=batch_size * tokens_per_request,
    )


def split_extend(
    extend_seq_lens: Sequence[int], *, balance_threshold: float = 0.48
) -> OverlapPlan | None:
    """Halve an extend pass between requests, or within one if that is too uneven.

    Args:
        extend_seq_lens: New tokens per request.
        balance_threshold: Least share of tokens that either half must get from a cut
            between requests; 0 never cuts within a request.

    Raises:
        ConfigError: The threshold is not within 0 and 0.5.
    """
    if not 0 <= balance_threshold <= 0.5:
        raise ConfigError(
            f"The overlap balance threshold is {balance_threshold}; a share of the smaller "
            "half lies within 0 and 0.5",
            balance_threshold=balance_threshold,
        )
    lens = tuple(extend_seq_lens)
    total = sum(lens)
    if total < 2:
        return None
    index = _balanced_index(lens)
    left = sum(lens[:index])
    if balance_threshold <= left / total <= 1 - balance_threshold:
        return _plan_extend(lens, index, left) if 0 < left < total else None
    return _plan_extend(lens, _crossing_index(lens, total // 2), total // 2)


def split_non_padded(token_split: int, num_tokens: int) -> tuple[int, int]:
    """How many of ``num_tokens`` real tokens fall into either half."""
    return min(token_split, num_tokens), max(0, num_tokens - token_split)


def _balanced_index(lens: Sequence[int]) -> int:
    """Last cut between requests that is no worse than the one before it; 0 for one request."""
    total, best, index = sum(lens), None, 0
    for i, left in enumerate(accumulate(lens[:-1]), start=1):
        uneven = abs(2 * left - total)
        if best is not None and uneven > best:
            break
        best, index = uneven, i
    return index


def _crossing_index(lens: Sequence[int], half: int) -> int:
    """First request whose running sum exceeds ``half``."""
    return next(i for i, end in enumerate(accumulate(lens)) if end > half)


def _plan_extend(lens: tuple[int, ...], index: int, token_split: int) -> OverlapPlan:
    taken = token_split - sum(lens[:index])
    # A cut at a request's first token is a cut between requests: no half gets an empty one.
    last = (taken,) if taken else ()
    return OverlapPlan(
        seq_split=index,
        token_split=token_split,
        two_chunk=taken > 0,
        children=(
            OverlapChild(
                requests=(0, index + len(last)),
                tokens=(0, token_split),
                extend_seq_lens=lens[:index] + last,
            ),
            OverlapChild(
                requests=(index, len(lens)),
                tokens=(token_split, sum(lens)),
                extend_seq_lens=(lens[index] - taken, *lens[index + 1 :]),
                prefix_growth=taken,
            ),
        ),
    )


def _plan(seq_split: int, token_split: int, *, batch_size: int, num_tokens: int) -> OverlapPlan:
    return OverlapPlan(
        seq_split=seq_split,
        token_split=token_split,
        children=(
            OverlapChild(requests=(0, seq_split), tokens=(0, token_split)),
            OverlapChild(requests=(seq_split, batch_size), tokens=(token_split, num_tokens)),
        ),
    )
