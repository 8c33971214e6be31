# SPDX-License-Identifier: Apache-2.0
"""From logits to tokens, on the device, without a host round trip.

The meaning of the operation ``sample_tokens``, and its parts for a sampler that runs outside
a recorded pass.  Greedy rows take the maximum.  Random rows use one uniform number each, made
from (seed, position) alone, and invert the cumulative distribution in the vocabulary's order:
the same seed gives the same token whatever else is in the batch, after preemption, and with
any chunking.

Shapes: S rows that sample, V vocabulary.
"""

from __future__ import annotations

__all__ = [
    "NOT_A_NUMBER",
    "FilterParams",
    "SamplingTables",
    "filter_sorted",
    "logprobs_of",
    "sample_filtered",
    "sample_greedy",
    "sample_plain",
    "sample_tokens",
    "uniform",
    "uniform_on_device",
]

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy.typing as npt

NOT_A_NUMBER = -2
"""Token id that stands for "these logits are not finite"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterParams:
    """Filters of some rows, on the device.

    Attributes:
        top_k: ``[S]`` int64; the vocabulary size where unlimited.
        top_p: ``[S]`` float32; 1 where unlimited.
        min_p: ``[S]`` float32; 0 where unlimited.
    """

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingTables:
    """Settings of every request row, on the device.

    Attributes:
        temperature: ``[R]`` float32; 0 = greedy.
        top_k: ``[R]`` int32; 0 = unlimited.
        top_p: ``[R]`` float32; 1 = unlimited.
        min_p: ``[R]`` float32; 0 = unlimited.
        seed: ``[R]`` int64, the bits of an unsigned number.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor


def sample_tokens(
    logits: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    tables: SamplingTables,
    last_tokens: Tensor,
) -> Tensor:
    """One token a row by the settings of its request, kept as the request's last token.

    Args:
        logits: ``[S, V]``.
        rows: ``[S]`` int32, request row of each; row 0 is padding.
        seq_lens: ``[S]`` int32, length before the new token joins: its position.
        tables: Settings.
        last_tokens: ``[R]`` int64, gets the tokens; 0 where the logits are not finite.

    Returns:
        ``[S]`` int64; ``NOT_A_NUMBER`` where the logits are not finite.
    """
    index = rows.long()
    temperature = tables.temperature[index]
    limit = tables.top_k[index].long()
    params = FilterParams(
        top_k=torch.where(limit > 0, limit, logits.shape[-1]),
        top_p=tables.top_p[index],
        min_p=tables.min_p[index],
    )
    u = uniform_on_device(tables.seed[index], seq_lens.long())
    heat = torch.where(temperature > 0, temperature, 1.0)
    random = sample_filtered(logits, heat, u, params)
    tokens = torch.where(temperature > 0, random, sample_greedy(logits))
    last_tokens[index] = tokens.clamp(min=0)
    return tokens


def sample_greedy(logits: Tensor) -> Tensor:
    """``[S, V]`` → ``[S]`` int64: the most likely token, the first of equals."""
    best, index = logits.max(dim=-1)
    return torch.where(torch.isnan(best), NOT_A_NUMBER, index)


def sample_plain(logits: Tensor, temperature: Tensor, u: Tensor) -> Tensor:
    """Sample without filters.

    Args:
        logits: ``[S, V]``.
        temperature: ``[S]`` float32, above 0.
        u: ``[S]`` float32 uniform numbers in [0, 1).

    Returns:
        ``[S]`` int64.
    """
    probs = torch.softmax(logits.float() / temperature[:, None], dim=-1)
    return _mark(_invert(probs, u), probs)


def sample_filtered(
    logits: Tensor, temperature: Tensor, u: Tensor, params: FilterParams
) -> Tensor:
    """As ``sample_plain`` after top-k, top-p and min-p, all on the same distribution.

    Filters that drop nothing change nothing.
    """
    probs = torch.softmax(logits.float() / temperature[:, None], dim=-1)
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    # Back in the vocabulary's order, in which rows without filters are inverted too.
    kept = torch.zeros_like(probs).scatter_(-1, order, filter_sorted(ordered, params))
    return _mark(_invert(kept, u), probs)


def filter_sorted(ordered: Tensor, params: FilterParams) -> Tensor:
    """Zero what the filters drop; the most likely token always stays.

    Args:
        ordered: ``[S, V]`` probabilities, descending.
        params: Filters; top-p keeps the fewest tokens that reach p, so a token goes when
            those before it have reached p already.

    Returns:
        ``[S, V]`` probabilities, not normalised again.
    """
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    before = ordered.cumsum(dim=-1) - ordered
    drop = rank >= params.top_k[:, None]
    drop |= (before >= params.top_p[:, None]) & (params.top_p[:, None] < 1.0)
    drop |= ordered < params.min_p[:, None] * ordered[:, :1]
    drop[:, 0] = False
    return ordered.masked_fill(drop, 0.0)


def logprobs_of(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities at temperature 1, before any filter.

    Args:
        logits: ``[S, V]``.
        tokens: ``[S]`` int64.
        top: How many of the most likely tokens to report.

    Returns:
        ``[S]`` of the tokens, ``[S, top]`` float32 of the best, ``[S, top]`` their ids.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(-1, tokens.clamp(min=0)[:, None])[:, 0]
    best, ids = logprobs.topk(top, dim=-1)
    return own, best, ids


def uniform(
    seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """``[S]`` numbers in [0, 1), a hash of (seed, position); host.

    Two rounds of the splitmix64 finalizer: cheap, and good enough that neighbouring
    positions and neighbouring seeds are unrelated (tested).
    """
    with np.errstate(over="ignore"):
        mixed = _mix(seeds + _mix(positions.astype(np.uint64) + _GOLDEN))
    return ((mixed >> np.uint64(40)).astype(np.float64) * 2.0**-24).astype(np.float32)


def uniform_on_device(seeds: Tensor, positions: Tensor) -> Tensor:
    """As ``uniform``, for ``[S]`` int64 tensors; the same numbers."""
    golden = int(_GOLDEN) - (1 << 64)
    mixed = _mix_tensor(seeds + _mix_tensor(positions + golden))
    return (_shift_right(mixed, 40).double() * 2.0**-24).float()


def _mix_tensor(x: Tensor) -> Tensor:
    # The multipliers of ``_mix`` as signed numbers: products wrap alike.
    x = (x ^ _shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shift_right(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds ``u`` of the total; never a zero weight."""
    cumulative = weights.cumsum(dim=-1)
    target = u[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Rounding may leave the target at the very end, behind the last weight that counts.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())[:, 0]
    return torch.minimum(index, last)


def _mark(tokens: Tensor, probs: Tensor) -> Tensor:
    return torch.where(torch.isnan(probs[:, 0]), NOT_A_NUMBER, tokens)
