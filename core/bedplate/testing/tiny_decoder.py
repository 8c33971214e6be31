# SPDX-License-Identifier: Apache-2.0
"""The smallest model that decodes over a paged cache: one attention layer, static shapes.

For tests of graph runners on any device: what it computes depends on every input slot (token,
position, row, length, slot to write), so a slot that is not refreshed changes the logits.
"""

from __future__ import annotations

__all__ = ["TinyAttention", "TinyDecoder", "decode_batch"]

from typing import Any

import torch
from torch import Tensor

from bedplate.batch.forward_batch import ForwardBatch
from bedplate.batch.forward_mode import CaptureHiddenMode, ForwardMode
from bedplate.batch.logits import LogitsOutput
from bedplate.contract.attention import AttentionBackend, AttentionCallSpec

_HIDDEN = 8
_VOCABULARY = 32
_CALL = AttentionCallSpec(
    call_id=0,
    module="attention",
    num_heads=1,
    num_kv_heads=1,
    head_dim=_HIDDEN,
    value_dim=_HIDDEN,
    scale=_HIDDEN**-0.5,
)


class TinyAttention(AttentionBackend):
    """Decode attention over the whole width of ``req_to_token``, masked by length.

    Attributes:
        keys, values: ``[slots, hidden]`` cache.
        req_to_token: ``[rows, width]`` int32; row 0 is all slot 0.
        prepared: Batches that ``prepare`` was given, the last one last.
    """

    def __init__(self, *, rows: int = 24, width: int = 12, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(1)
        slots = rows * width
        shape = (slots, _HIDDEN)
        self.keys = torch.randn(shape, generator=generator).to(device)
        self.values = torch.randn(shape, generator=generator).to(device)
        table = torch.arange(slots, dtype=torch.int32).view(rows, width)
        table[0] = 0
        self.req_to_token = table.to(device)
        self.prepared: list[ForwardBatch] = []
        self._visible = torch.empty(0)

    def prepare(self, batch: ForwardBatch) -> None:
        """Nothing but a note; all metadata is made in the graph."""
        self.prepared.append(batch)

    def prepare_in_graph(self, batch: ForwardBatch) -> None:
        """The mask, from lengths on the device."""
        columns = torch.arange(self.req_to_token.shape[1], device=batch.seq_lens.device)
        self._visible = columns < batch.seq_lens[:, None]

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        call: AttentionCallSpec,
        batch: ForwardBatch,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Write, gather, attend."""
        assert k is not None
        assert v is not None
        self.keys.index_copy_(0, batch.out_cache_loc.long(), k[:, 0])
        self.values.index_copy_(0, batch.out_cache_loc.long(), v[:, 0])
        slots = self.req_to_token[batch.req_pool_indices.long()].long()
        scores = torch.einsum("bd,bld->bl", q[:, 0], self.keys[slots]) * call.scale
        scores = scores.masked_fill(~self._visible, float("-inf"))
        return torch.einsum("bl,bld->bd", scores.softmax(-1), self.values[slots])[:, None]

    def forward_extend(self, *_: Any, **__: Any) -> Tensor:
        """Not part of this model's life.

        Raises:
            AssertionError: Always.
        """
        raise AssertionError("TinyDecoder only decodes")


class TinyDecoder(torch.nn.Module):
    """Embedding, positions, attention, output matrix.

    Args:
        attention: Whose cache is used.
        device: Place of the weights.
    """

    def __init__(self, attention: AttentionBackend, device: str = "cpu") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.attention = attention
        self.embedding = torch.nn.Parameter(
            torch.randn(_VOCABULARY, _HIDDEN, generator=generator).to(device)
        )

    def forward(self, batch: ForwardBatch) -> LogitsOutput:
        """One decode pass.

        Returns:
            Logits ``[B, 32]`` and, where asked for, hidden states ``[B, 8]``.
        """
        hidden = self.embedding[batch.input_ids] + batch.positions[:, None].float().sin()
        heads = hidden[:, None]
        hidden = hidden + self.attention.forward(heads, heads.cos(), heads, _CALL, batch)[:, 0]
        kept = batch.capture_hidden is not CaptureHiddenMode.NULL
        return LogitsOutput(
            next_token_logits=hidden @ self.embedding.T,
            hidden_states=hidden if kept else None,
        )


def decode_batch(
    lengths: list[int],
    attention: TinyAttention,
    *,
    hidden: CaptureHiddenMode = CaptureHiddenMode.NULL,
    seed: int = 0,
    first_row: int = 1,
) -> ForwardBatch:
    """A decode batch whose request i is in row ``first_row + i``, of ``lengths[i]`` tokens."""
    device = attention.req_to_token.device
    generator = torch.Generator().manual_seed(seed)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    rows = torch.arange(first_row, first_row + len(lengths), dtype=torch.int32)
    last = (seq_lens - 1).long()
    tokens = torch.randint(_VOCABULARY, (len(lengths),), generator=generator)
    return ForwardBatch(
        mode=ForwardMode.DECODE,
        batch_size=len(lengths),
        input_ids=tokens.to(device),
        positions=last.to(device),
        req_pool_indices=rows.to(device),
        seq_lens=seq_lens.to(device),
        seq_lens_cpu=seq_lens,
        out_cache_loc=attention.req_to_token[rows.long(), last].long().to(device),
        capture_hidden=hidden,
    )
