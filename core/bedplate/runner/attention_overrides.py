# SPDX-License-Identifier: Apache-2.0
"""An attention implementation of a pack proves itself on the cache that will be used.

Made-up requests of several lengths are prefilled, continued and decoded, once for each distinct
call of the model: by the override, by what it replaces and by the reference.  What is stored
counts as much as what is returned.

Shapes: B requests, T new tokens, H query heads, K key/value heads, D key size, Dv value size.
"""

from __future__ import annotations

__all__ = ["prove_attention"]

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
from bedplate.batch.forward_mode import ForwardMode
from bedplate.contract.decisions import Candidate, Decision, Verdict
from bedplate.reference.attention import ReferenceAttention, store
from bedplate.runner.overrides import SLOWER
from bedplate.runner.proof import gap_between, seconds_per_call

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from bedplate.contract.attention import (
        AttentionBackend,
        AttentionBuild,
        AttentionCallSpec,
        AttentionProvider,
    )
    from bedplate.registry.decisions import DecisionLog

SLACK = 4.0
"""Units of the tolerance of one sum: attention makes two, and a softmax between them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pass:
    """One pass of one call.

    Attributes:
        name: For people.
        batch: The pass.
        call: The call.
        q: ``[T, H, D]``.
        k: ``[T, K, D]``.
        v: ``[T, K, Dv]``, or ``None`` for latent calls.
        sinks: ``[H]``, or ``None``.
    """

    name: str
    batch: ForwardBatch
    call: AttentionCallSpec
    q: Tensor
    k: Tensor
    v: Tensor | None
    sinks: Tensor | None

    def run(self, attention: AttentionBackend) -> Tensor:
        """``[T, H, Dv]``; the batch is prepared."""
        return attention.forward(
            self.q, self.k, self.v, self.call, self.batch, sinks=self.sinks
        )


def prove_attention(
    provider: AttentionProvider,
    rival: AttentionProvider,
    build: AttentionBuild,
    decisions: DecisionLog,
    *,
    timed: bool,
) -> str:
    """Compare an override with the reference, and its time with what it replaces.

    Uses the first rows of the table and the first pages of the cache, before any request does.
    Records ``override.attention``.

    Args:
        provider: The override.
        rival: What it replaces.
        build: What both are built from.
        decisions: Receives the verdict.
        timed: Whether a slower one is refused.

    Returns:
        Why it has to go; empty if it may stay.
    """
    with decisions.choosing("override.attention") as decide:
        verdict, reason, figures = _judge(provider, rival, build, timed=timed)
        kept = verdict == "chosen"
        candidates = (
            Candidate(name=provider.name, verdict=verdict, reason=reason),
            Candidate(
                name=rival.name,
                verdict="possible" if kept else "chosen",
                reason="what the override replaces",
            ),
        )
        chosen = provider.name if kept else rival.name
        point = "override.attention"
        decide(Decision(point=point, chosen=chosen, candidates=candidates, detail=figures))
    return "" if kept else reason


def _judge(
    provider: AttentionProvider,
    rival: AttentionProvider,
    build: AttentionBuild,
    *,
    timed: bool,
) -> tuple[Verdict, str, dict[str, str]]:
    reference = ReferenceAttention(build)
    figures: dict[str, str] = {}
    total = [0.0, 0.0]
    try:
        both = provider.build(build), rival.build(build)
        for each in _passes(build):
            want = _outcome(each, reference, build)
            _spoil(each, build)
            gap = gap_between(_outcome(each, both[0], build), want, slack=SLACK)
            figures[each.name] = str(gap)
            if not gap.ok:
                return "failed", f"wrong on {each.name}: {gap} to the reference", figures
            if not timed:
                continue
            seconds = _seconds(each, both, build)
            total = [sum(pair) for pair in zip(total, seconds, strict=True)]
            mine, theirs = (f"{second * 1e6:.0f} µs" for second in seconds)
            figures[each.name] += f"; {mine}, {rival.name} {theirs}"
    except Exception as error:
        return "failed", f"it raised {type(error).__name__}: {error}", figures
    finally:
        build.req_to_token[1 : build.max_batch_size + 1].zero_()
    if not timed:
        return "chosen", "agrees with the reference", figures
    speed = total[1] / total[0]
    against = f"{speed:.2f} times the speed of {rival.name}"
    if speed * SLOWER < 1:
        return "refused", f"slower: {against}", figures
    return "chosen", f"agrees with the reference; {against}", figures


def _outcome(
    each: _Pass, attention: AttentionBackend, build: AttentionBuild
) -> tuple[Tensor, ...]:
    """What is returned, and what then lies in the cache."""
    attention.prepare(each.batch)
    attention.prepare_in_graph(each.batch)
    out = each.run(attention).clone()
    slots = each.batch.out_cache_loc.long()
    kept = [build.kv_pool.key(each.call.cache_id), build.kv_pool.value(each.call.cache_id)]
    return (out, *(x[slots].to(build.dtype) for x in kept))


def _spoil(each: _Pass, build: AttentionBuild) -> None:
    """Overwrite what was stored, so that only who stores it again finds it."""
    v = None if each.v is None else -each.v
    store(build.kv_pool, -each.k, v, each.call, each.batch)


def _seconds(
    each: _Pass, both: Sequence[AttentionBackend], build: AttentionBuild
) -> list[float]:
    for attention in both:
        attention.prepare(each.batch)
        attention.prepare_in_graph(each.batch)
    return seconds_per_call(build.runtime, [partial(each.run, one) for one in both])


def _passes(build: AttentionBuild) -> list[_Pass]:
    """Prefill, continue and decode, for every distinct call that stores its own keys."""
    lengths = _lengths(build)
    _fill_table(build, lengths)
    halves = [length // 2 for length in lengths]
    batches = {
        "prefill": _batch(build, lengths, [0] * len(lengths)),
        "continue": _batch(build, lengths, halves),
        "decode": _batch(build, lengths, None),
    }
    distinct = {
        replace(call, call_id=0, module="", ordinal=0): call
        for call in reversed(build.calls)
        if call.alias_of is None
    }
    generator = torch.Generator().manual_seed(0)
    return [
        _pass(f"{call.module} {name}", batch, call, build, generator)
        for call in distinct.values()
        for name, batch in batches.items()
    ]


def _lengths(build: AttentionBuild) -> list[int]:
    """Around a page's end, and several pages, as far as they fit."""
    page = build.page_size
    wanted = [min(n, build.max_context_len) for n in (1, page, page + 1, 3 * page + 2)]
    fitting, pages = [], build.kv_pool.num_tokens // page
    for length in wanted[-build.max_batch_size :]:
        pages -= -(-length // page)
        if pages >= 0:
            fitting.append(length)
    return fitting or [1]


def _fill_table(build: AttentionBuild, lengths: Sequence[int]) -> None:
    page = build.page_size  # page 0 belongs to padding
    for row, length in enumerate(lengths, start=1):
        slots = torch.arange(page, page + length, dtype=torch.int32)
        build.req_to_token[row, :length] = slots.to(build.req_to_token.device)
        page += -(-length // build.page_size) * build.page_size


def _batch(
    build: AttentionBuild, lengths: Sequence[int], prefixes: Sequence[int] | None
) -> ForwardBatch:
    """The last tokens of every request after its prefix, or one each in decode."""
    decode = prefixes is None
    starts = [length - 1 for length in lengths] if prefixes is None else prefixes
    spans = list(zip(lengths, starts, strict=True))
    device = build.runtime.device
    rows = build.req_to_token[1 : len(lengths) + 1]
    positions = torch.cat([torch.arange(start, end) for end, start in spans])
    slots = torch.cat([row[start:end] for row, (end, start) in zip(rows, spans, strict=True)])

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    new = [end - start for end, start in spans]
    extend = ExtendPart(
        seq_lens=ints(new).to(device),
        prefix_lens=ints(starts).to(device),
        start_loc=ints([sum(new[:i]) for i in range(len(new))]).to(device),
        seq_lens_cpu=ints(new),
        prefix_lens_cpu=ints(starts),
    )
    return ForwardBatch(
        mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
        batch_size=len(lengths),
        input_ids=torch.zeros_like(positions, device=device),
        positions=positions.to(device),
        req_pool_indices=torch.arange(1, len(lengths) + 1, dtype=torch.int32, device=device),
        seq_lens=ints(lengths).to(device),
        seq_lens_cpu=ints(lengths),
        out_cache_loc=slots,
        extend=None if decode else extend,
    )


def _pass(
    name: str,
    batch: ForwardBatch,
    call: AttentionCallSpec,
    build: AttentionBuild,
    generator: torch.Generator,
) -> _Pass:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(build.runtime.device, build.dtype)

    tokens = batch.num_tokens
    latent = call.value_in_key
    return _Pass(
        name=name,
        batch=batch,
        call=call,
        q=random(tokens, call.num_heads, call.head_dim),
        k=random(tokens, call.num_kv_heads, call.head_dim),
        v=None if latent else random(tokens, call.num_kv_heads, call.value_dim),
        sinks=random(call.num_heads) if call.sinks else None,
    )
