# SPDX-License-Identifier: Apache-2.0
"""A few tokens through a model as it will run, without a cache, and what attention saw.

The model is already behind the bridge; the attention here keeps nothing between passes, so a
trial needs neither pools nor a scheduler.  Patterns are found in what it records, and fused
forms are held against it.

Shapes: T tokens, H query heads, K key/value heads, D key size, Dv value size.
"""

from __future__ import annotations

__all__ = ["Attended", "Trial"]

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
from bedplate.batch.forward_mode import ForwardMode
from bedplate.contract.attention import AttentionBackend
from bedplate.reference.attention import attend, visible

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bedplate.contract.attention import AttentionCallSpec
    from bedplate.models.adapter import HFModel

TRIAL_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attended:
    """One attention call of the trial.

    Attributes:
        call: Its description.
        q: ``[T, H, D]`` as it arrived.
        k: ``[T, K, D]``, or ``None`` where another call's are read.
        v: ``[T, K, Dv]``, or ``None``.
        sinks: As they arrived.
        out: ``[T, H, Dv]``.
    """

    call: AttentionCallSpec
    q: Tensor
    k: Tensor | None
    v: Tensor | None
    sinks: Tensor | None
    out: Tensor


class Trial:
    """Runs a model on eight tokens, or on one.

    Args:
        model: Behind the bridge, with its weights.
        max_positions: Longest request that it will serve; sizes what is tabulated.

    Attributes:
        attended: Attention calls of the last run.
        positions: ``[T]`` int64 of the eight tokens: neighbours at the start, then further
            and further apart up to the last position. What depends on the position, such as
            queries that grow with it, shows.
    """

    def __init__(self, model: HFModel, max_positions: int) -> None:
        self.model = model
        self.max_positions = max(max_positions, TRIAL_TOKENS)
        self.attended: list[Attended] = []
        device = next(model.module.parameters()).device
        self.positions = torch.tensor(_spread(self.max_positions), device=device)

    def run(
        self,
        _module: nn.Module,
        tokens: int = TRIAL_TOKENS,
        rows: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Logits ``[T, V]`` of the first tokens, or of some of them.

        Of more than eight, at neighbouring places.
        """
        attention = _TrialAttention()
        self.model.bind_attention(attention)
        batch = self._batch(tokens)
        if rows is not None:
            wanted = torch.tensor(rows, device=batch.input_ids.device)
            batch = replace(batch, logits_rows=wanted)
        logits = self.model.forward(batch).next_token_logits
        self.attended = attention.seen
        return logits

    def _batch(self, count: int) -> ForwardBatch:
        device = next(self.model.module.parameters()).device
        length = torch.tensor([count], dtype=torch.int32)
        none = torch.zeros(1, dtype=torch.int32)
        # From 1 on: token 0 is padding in many models and may be masked.
        ids = torch.arange(1, count + 1, device=device) % self.model.spec.vocab_size
        return ForwardBatch(
            mode=ForwardMode.EXTEND,
            batch_size=1,
            input_ids=ids,
            positions=self._positions(count),
            req_pool_indices=none.to(device),
            seq_lens=length.to(device),
            seq_lens_cpu=length,
            out_cache_loc=torch.zeros(count, dtype=torch.int32, device=device),
            extend=ExtendPart(
                seq_lens=length.to(device),
                prefix_lens=none.to(device),
                start_loc=none.to(device),
                seq_lens_cpu=length,
                prefix_lens_cpu=none,
            ),
        )

    def _positions(self, count: int) -> Tensor:
        if count <= TRIAL_TOKENS:
            return self.positions[:count]
        return torch.arange(count, device=self.positions.device)


def _spread(limit: int) -> list[int]:
    """Eight ascending positions below ``limit``, which is at least 8; its last one included."""
    half = TRIAL_TOKENS // 2
    rest = limit - half
    far = [half - 1 + rest * step**2 // half**2 for step in range(1, half + 1)]
    return [*range(half), *far]


class _TrialAttention(AttentionBackend):
    """One request without a past, in plain torch; remembers what it was given."""

    def __init__(self) -> None:
        self.seen: list[Attended] = []
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}

    def prepare(self, batch: ForwardBatch) -> None:
        """Nothing to prepare."""

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        call: AttentionCallSpec,
        batch: ForwardBatch,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend among the new tokens."""
        if k is not None:
            self._stored[call.call_id] = (k, k[..., : call.value_dim] if v is None else v)
        keys, values = self._stored[call.cache_id]
        mask = visible(batch.positions, batch.positions, call)
        out = attend(q, keys, values, mask, call, sinks)
        self.seen.append(Attended(call=call, q=q, k=k, v=v, sinks=sinks, out=out))
        return out

    forward_decode = forward_extend
