# SPDX-License-Identifier: Apache-2.0
"""The smallest model that works over a paged cache: one attention layer, static shapes.

For tests of graph runners on any device: what it computes depends on every input slot (token,
position, row, length, slot to write), so a slot that is not refreshed changes the logits.
"""

from __future__ import annotations

__all__ = ["TinyAttention", "TinyDecoder", "decode_batch", "prompt_batch"]

from typing import Protocol

import torch
from torch import Tensor

from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
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
    """Attention over the whole width of ``req_to_token``, masked by what a token sees.

    Attributes:
        keys, values: ``[slots, hidden]`` cache.
        req_to_token: ``[rows, width]`` int32; row 0 is all slot 0.
        prepared: Batches that ``prepare`` was given, the last one last.
    """

    extend_recordable = True

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
        self._rows = self._visible = torch.empty(0)

    def prepare(self, batch: ForwardBatch) -> None:
        """Nothing but a note; all metadata is made in the graph."""
        self.prepared.append(batch)

    def prepare_in_graph(self, batch: ForwardBatch) -> None:
        """Each token's row and mask, from what the device has."""
        columns = torch.arange(self.req_to_token.shape[1], device=batch.seq_lens.device)
        if batch.extend is None:
            self._rows = batch.req_pool_indices.long()
            self._visible = columns < batch.seq_lens[:, None]
            return
        tokens = torch.arange(batch.num_tokens, device=columns.device)[:, None]
        start, count = batch.extend.start_loc, batch.extend.seq_lens
        ours = (tokens >= start) & (tokens < start + count)
        self._rows = (ours * batch.req_pool_indices).sum(1)  # spare tokens: row 0
        self._visible = columns <= batch.positions[:, None]

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
        slots = self.req_to_token[self._rows].long()
        scores = torch.einsum("td,tld->tl", q[:, 0], self.keys[slots]) * call.scale
        scores = scores.masked_fill(~self._visible, float("-inf"))
        return torch.einsum("tl,tld->td", scores.softmax(-1), self.values[slots])[:, None]

    forward_extend = forward_decode


class TinyDecoder(torch.nn.Module):
    """Embedding, positions, attention, output matrix.

    Args:
        attention: Whose cache is used.
        device: Place of the weights.
        call: The attention call, of one head; its size is that of the hidden states.
        dtype: Of the weights.
    """

    def __init__(
        self,
        attention: AttentionBackend,
        device: str = "cpu",
        *,
        call: AttentionCallSpec = _CALL,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.attention, self._call = attention, call
        weight = torch.randn(_VOCABULARY, call.head_dim, generator=generator)
        self.embedding = torch.nn.Parameter(weight.to(dtype).to(device))

    def forward(self, batch: ForwardBatch) -> LogitsOutput:
        """One pass.

        Returns:
            Logits ``[R, 32]`` and, where asked for, hidden states ``[T, D]``.
        """
        angles = batch.positions[:, None].float().sin()
        hidden = self.embedding[batch.input_ids] + angles.to(self.embedding.dtype)
        heads = hidden[:, None]
        attended = self.attention.forward(heads, heads.cos(), heads, self._call, batch)
        hidden = hidden + attended[:, 0]
        kept = batch.capture_hidden is not CaptureHiddenMode.NULL
        rows = hidden if batch.logits_rows is None else hidden[batch.logits_rows]
        return LogitsOutput(
            next_token_logits=rows @ self.embedding.T,
            hidden_states=hidden if kept else None,
        )


class Rows(Protocol):
    """Whoever has a table of slots."""

    req_to_token: Tensor


def decode_batch(
    lengths: list[int],
    attention: Rows,
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
        out_cache_loc=attention.req_to_token[rows.long().to(device), last.to(device)].long(),
        capture_hidden=hidden,
    )


def prompt_batch(
    counts: list[int],
    attention: TinyAttention,
    *,
    prefixes: list[int] | None = None,
    seed: int = 0,
) -> ForwardBatch:
    """An extend batch whose request i is in row i + 1 and gets ``counts[i]`` new tokens.

    Behind ``prefixes[i]`` cached ones; logits are wanted of the last token of each.
    """
    device = attention.req_to_token.device
    new = torch.tensor(counts, dtype=torch.int32)
    old = torch.tensor(prefixes or [0] * len(counts), dtype=torch.int32)
    rows = torch.arange(1, len(counts) + 1, dtype=torch.int32)
    ends = new.cumsum(0)
    positions = torch.cat(
        [torch.arange(p, p + n) for p, n in zip(old.tolist(), counts, strict=True)]
    )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(_VOCABULARY, (int(ends[-1]),), generator=generator)
    row_of_token = rows.repeat_interleave(new).long().to(device)
    return ForwardBatch(
        mode=ForwardMode.EXTEND,
        batch_size=len(counts),
        input_ids=tokens.to(device),
        positions=positions.to(device),
        req_pool_indices=rows.to(device),
        seq_lens=(old + new).to(device),
        seq_lens_cpu=old + new,
        out_cache_loc=attention.req_to_token[row_of_token, positions.to(device)].long(),
        logits_rows=(ends - 1).to(device),
        extend=ExtendPart(
            seq_lens=new.to(device),
            prefix_lens=old.to(device),
            start_loc=(ends - new).int().to(device),
            seq_lens_cpu=new,
            prefix_lens_cpu=old,
        ),
    )
