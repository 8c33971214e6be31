# SPDX-License-Identifier: Apache-2.0
"""Mistakes of attention.

Most are the reference with a changed call, batch or table, so each is a few lines.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from tests.conformance.mutants.base import mutant

from bedplate.contract import Support
from bedplate.reference.attention import ReferenceAttention, store
from bedplate_cpu.attention import providers


class Changed(ReferenceAttention):
    """The reference, with another call."""

    def __init__(self, build, change):
        super().__init__(build)
        self.page_size = build.page_size
        self.change = change

    def forward_extend(self, q, k, v, call, batch, *, sinks=None):
        call, sinks = self.change(call, sinks)
        return super().forward_extend(q, k, v, call, batch, sinks=sinks)

    forward_decode = forward_extend


def changed(**facts):
    """The call with other facts, where it has them at all."""

    def change(call, sinks):
        present = {name: value for name, value in facts.items() if getattr(call, name)}
        return replace(call, **present), sinks

    return partial(Changed, change=change)


def window_off_by_one(call, sinks):
    return (replace(call, window=call.window + 1) if call.window else call), sinks


def without_sinks(call, _sinks):
    return call, None


class SharedCalls(ReferenceAttention):
    """The reference, request by request, with a hook to change what one sees."""

    def __init__(self, build):
        super().__init__(build)
        self.page_size = build.page_size
        self.table = build.req_to_token
        self.build = build


class OffByOnePage(SharedCalls):
    """From the second page on, the table is read one page further."""

    def _request(self, q, call, batch, request, sinks):
        own = self._req_to_token
        shifted = own.clone()
        length = int(batch.seq_lens_cpu[request])
        if length > 2 * self.page_size:
            row = batch.req_pool_indices[request].long()
            shifted[row, self.page_size : -self.page_size] = own[row, 2 * self.page_size :]
        self._req_to_token = shifted
        try:
            return super()._request(q, call, batch, request, sinks)
        finally:
            self._req_to_token = own


class AssumesConsecutivePages(SharedCalls):
    """Reads the cache as if a request's pages lay one behind the other."""

    def _request(self, q, call, batch, request, sinks):
        own = self._req_to_token
        row = int(batch.req_pool_indices[request])
        straight = own.clone()
        straight[row] = own[row, 0] + torch.arange(own.shape[1], dtype=own.dtype)
        straight[row].clamp_(max=len(self._pool.key(call.cache_id)) - 1)
        self._req_to_token = straight
        try:
            return super()._request(q, call, batch, request, sinks)
        finally:
            self._req_to_token = own


class ReadsStaleTail(SharedCalls):
    """Multiplies the rest of the last page by zero instead of leaving it out."""

    def forward_extend(self, q, k, v, call, batch, *, sinks=None):
        out = super().forward_extend(q, k, v, call, batch, sinks=sinks)
        values = self._pool.value(call.cache_id)
        for row, length in enumerate(batch.seq_lens_cpu.tolist()):
            if length % self.page_size and batch.req_pool_indices[row]:
                last = int(self.table[batch.req_pool_indices[row].long(), length - 1])
                tail = values[last + 1 : last // self.page_size * self.page_size
                              + self.page_size]  # fmt: skip
                out += 0 * tail.float().sum().to(out.dtype)
        return out

    forward_decode = forward_extend


class StoresAfterReading(SharedCalls):
    """The new token does not see itself."""

    def forward_extend(self, q, k, v, call, batch, *, sinks=None):
        spoiled = None if k is None else torch.zeros_like(k)
        out = super().forward_extend(q, spoiled, v, call, batch, sinks=sinks)
        store(self._pool, k, v, call, batch)
        return out

    forward_decode = forward_extend


class PaddingLeak(SharedCalls):
    """Rows of padding write behind the last real token instead of to slot 0."""

    def forward_extend(self, q, k, v, call, batch, *, sinks=None):
        slots = batch.out_cache_loc
        real = int((slots != 0).sum())
        if 0 < real < len(slots):
            moved = torch.where(slots == 0, slots[real - 1] + 1, slots)
            batch = replace(batch, out_cache_loc=moved)
        return super().forward_extend(q, k, v, call, batch, sinks=sinks)

    forward_decode = forward_extend


class WritesOverPrefix(SharedCalls):
    """The last cached token is written again."""

    def forward_extend(self, q, k, v, call, batch, *, sinks=None):
        out = super().forward_extend(q, k, v, call, batch, sinks=sinks)
        row, length = int(batch.req_pool_indices[0]), int(batch.seq_lens_cpu[0])
        if row and length > 1 and batch.mode.is_decode():
            self._pool.key(call.cache_id)[int(self.table[row, length - 2])] *= 2
        return out

    forward_decode = forward_extend


class HeadsInterleaved(SharedCalls):
    """Query head h reads key head h mod K."""

    def _request(self, q, call, batch, request, sinks):
        groups, keys = call.num_heads // call.num_kv_heads, call.num_kv_heads
        order = torch.arange(call.num_heads).view(keys, groups).T.reshape(-1)
        back = torch.argsort(order)
        sinks = None if sinks is None else sinks[back]
        return super()._request(q[:, back], call, batch, request, sinks)[:, order]


class SortedRows(SharedCalls):
    """Takes the table's rows in ascending order, whatever the batch says."""

    def forward_extend(self, q, k, v, call, batch, *, sinks=None):
        rows = batch.req_pool_indices
        real = rows[rows != 0].sort().values
        batch = replace(batch, req_pool_indices=torch.cat([real, rows[rows == 0]]))
        return super().forward_extend(q, k, v, call, batch, sinks=sinks)

    forward_decode = forward_extend


class IgnoresPrefix(SharedCalls):
    """New tokens of a chunk see each other, and the prefix as if it were behind them."""

    def _request(self, q, call, batch, request, sinks):
        if len(q) > 1 and int(batch.seq_lens_cpu[request]) > len(q):
            lengths = batch.seq_lens_cpu.clone()
            lengths[request] -= 1
            batch = replace(batch, seq_lens_cpu=lengths)
        return super()._request(q, call, batch, request, sinks)


class MixedAsPrefill(SharedCalls):
    """One-token rows of a mixed pass see only themselves."""

    def _request(self, q, call, batch, request, sinks):
        if batch.mode.is_mixed() and len(q) == 1:
            call = replace(call, window=1)
        return super()._request(q, call, batch, request, sinks)


class InHalf(SharedCalls):
    """Probabilities and values are multiplied in bfloat16."""

    def _request(self, q, call, batch, request, sinks):
        out = super()._request(q.bfloat16(), call, batch, request, sinks)
        return out.to(q.dtype)


class LastColumns(SharedCalls):
    """Latent values are the last columns of a key, not the first."""

    def __init__(self, build):
        super().__init__(build)
        if build.calls[0].value_in_key:
            first = build.calls[0]
            keys = build.kv_pool.key(0)
            self._pool = _Values(build.kv_pool, keys[..., first.head_dim - first.value_dim :])


class _Values:
    def __init__(self, pool, values):
        self.key, self.write = pool.key, pool.write
        self.value = lambda _call: values


class NoMixed(SharedCalls):
    """Fails for the first token of a request."""

    def forward_decode(self, q, k, v, call, batch, *, sinks=None):
        assert int(batch.seq_lens_cpu.min()) > 1
        return self.forward_extend(q, k, v, call, batch, sinks=sinks)


class Noisy(SharedCalls):
    calls = 0

    def forward_extend(self, q, k, v, call, batch, *, sinks=None):
        type(self).calls += 1
        out = super().forward_extend(q, k, v, call, batch, sinks=sinks)
        return out * (1 + 2**-23 * (type(self).calls % 3))

    forward_decode = forward_extend


class UnstableUnderBatchOrder(SharedCalls):
    """The last bits of a request depend on its place in the batch."""

    def _request(self, q, call, batch, request, sinks):
        return super()._request(q, call, batch, request, sinks) * (1 + 2**-23 * request)


class WrongDtype(SharedCalls):
    def forward_extend(self, q, k, v, call, batch, *, sinks=None):
        return super().forward_extend(q, k, v, call, batch, sinks=sinks).float()

    forward_decode = forward_extend


class ChangesQueries(SharedCalls):
    def forward_extend(self, q, k, v, call, batch, *, sinks=None):
        q.mul_(call.scale)
        return super().forward_extend(q, k, v, replace(call, scale=1.0), batch, sinks=sinks)

    forward_decode = forward_extend


class HostLengthsOnly(SharedCalls):
    """Takes lengths from the last ``prepare``, one call late."""

    lengths = None

    def prepare(self, batch):
        self.seen, type(self).lengths = type(self).lengths, batch.seq_lens_cpu

    def forward_extend(self, q, k, v, call, batch, *, sinks=None):
        if self.seen is not None and len(self.seen) == batch.batch_size:
            stale = torch.minimum(self.seen, batch.seq_lens_cpu)
            batch = replace(batch, seq_lens_cpu=stale)
        return super().forward_extend(q, k, v, call, batch, sinks=sinks)

    forward_decode = forward_extend


def everything(_request):
    return Support.yes("all")


def no_caps(request):
    refused = any(call.softcap for call in request.calls)
    return Support(False) if refused else providers()[0].supports(request)


MUTANTS = {
    "off_by_one_page": mutant(
        3, "pages from the second on are the next ones", attention=OffByOnePage
    ),
    "assumes_consecutive_pages": mutant(
        3, "the table's first slot is all that is read", attention=AssumesConsecutivePages
    ),
    "reads_stale_tail": mutant(
        3, "what lies behind the last token is multiplied by zero", attention=ReadsStaleTail
    ),
    "ignored_window": mutant(3, "windows are ignored", attention=changed(window=None)),
    "window_off_by_one": mutant(
        3, "a window is one token wider", attention=partial(Changed, change=window_off_by_one)
    ),
    "ignored_chunk": mutant(3, "chunks are ignored", attention=changed(chunk=None)),
    "ignored_softcap": mutant(3, "caps of scores are ignored", attention=changed(softcap=None)),
    "ignored_sinks": mutant(
        3, "sinks are ignored", attention=partial(Changed, change=without_sinks)
    ),
    "wrong_scale": mutant(
        3,
        "the scale is derived from the head size",
        attention=partial(
            Changed, change=lambda call, s: (replace(call, scale=call.head_dim**-0.5), s)
        ),
    ),
    "not_causal": mutant(3, "tokens see later ones", attention=changed(causal=False)),
    "always_causal": mutant(
        3,
        "claims calls that see later tokens, and hides them",
        attention=partial(Changed, change=lambda call, s: (replace(call, causal=True), s)),
    ),
    "stores_after_reading": mutant(
        3, "a new token does not see itself", attention=StoresAfterReading
    ),
    "padding_leak": mutant(3, "padding writes to a real slot", attention=PaddingLeak),
    "writes_over_prefix": mutant(
        3, "a cached token is written again", attention=WritesOverPrefix
    ),
    "heads_interleaved": mutant(
        3, "query heads read the wrong key heads", attention=HeadsInterleaved
    ),
    "sorted_rows": mutant(
        3, "requests must lie in the order of their rows", attention=SortedRows
    ),
    "ignores_prefix": mutant(
        3, "a chunk is off by one against its prefix", attention=IgnoresPrefix
    ),
    "mixed_as_prefill": mutant(
        3, "decoding rows of a mixed pass see only themselves", attention=MixedAsPrefill
    ),
    "attention_in_half": mutant(
        3, "float32 attention is computed in bfloat16", attention=InHalf
    ),
    "latent_last_columns": mutant(
        3, "latent values are the wrong columns", attention=LastColumns
    ),
    "no_first_token": mutant(3, "a request of one token fails to decode", attention=NoMixed),
    "attention_is_noisy": mutant(
        3, "promises equal bits, and repeats with others", attention=Noisy
    ),
    "unstable_under_batch_order": mutant(
        3,
        "promises batch_invariant, and bits depend on the place in the batch",
        attention=UnstableUnderBatchOrder,
        determinism="batch_invariant",
    ),
    "wrong_result_dtype": mutant(3, "float32 comes back for bfloat16", attention=WrongDtype),
    "changes_queries": mutant(3, "queries are scaled in place", attention=ChangesQueries),
    "stale_lengths": mutant(3, "lengths of the pass before", attention=HostLengthsOnly),
    "claims_everything": mutant(
        3, "supports() never says no", supports=everything, only="L3/native/never*"
    ),
    "refuses_calls_without_reason": mutant(
        3, "supports() says no and not why", supports=no_caps
    ),
}
