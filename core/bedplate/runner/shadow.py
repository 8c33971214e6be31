# SPDX-License-Identifier: Apache-2.0
"""A second backend that looks on: the same pass from the same state, compared part by part.

Before a pass that is looked at, the shadow gets what the cache holds of its requests; then both
run it eagerly, and the shadow is led: each of its parts is given what the first backend's part
was given.  The first part that gives something else is the one to blame, and nothing has to be
kept in step in between.

A pass that a graph would serve runs eagerly when it is looked at, by the same kernels.
"""

from __future__ import annotations

__all__ = ["Divergence", "Shadow", "ShadowReport", "open_shadow"]

import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from bedplate.batch.forward_batch import ExtendPart
from bedplate.contract.decisions import Candidate, Decision
from bedplate.env import PluginFilter
from bedplate.errors import ConfigError
from bedplate.models.fusion.rope import RotarySite
from bedplate.models.trace import Trace, traced
from bedplate.reference.attention import reference_provider
from bedplate.reference.ops import OPERATIONS
from bedplate.registry.decisions import DecisionLog
from bedplate.registry.door import open_backend
from bedplate.registry.select import BackendRequest
from bedplate.runner.model_runner import ModelRunner
from bedplate.runner.proof import Gap, gap_between

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.batch.logits import LogitsOutput
from bedplate.models.trace import Part

_log = logging.getLogger(__name__)

SLACK = 4.0
"""Units of the tolerance of one sum of products: a part may be a layer."""

MOST_TOKENS = 1 << 15
"""Tokens that the shadow's cache holds."""

MOST_NEW_TOKENS = 1 << 10
"""New tokens of a pass that is looked at: everything it computes is kept for a moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """The first part of a pass that gave something else.

    Attributes:
        step: Number of the pass since start, from 1.
        mode: Name of its forward mode.
        part: Path of the module, or of the module and ``attention``.
        gap: How far apart, and what is allowed.
        served_by: Fused form that served the part; empty for the module itself.
    """

    step: int
    mode: str
    part: str
    gap: Gap
    served_by: str

    def __str__(self) -> str:
        by = f" (fused: {self.served_by})" if self.served_by else ""
        return f"step {self.step} ({self.mode}), {self.part}{by}: {self.gap}"


@dataclass(slots=True, kw_only=True)
class ShadowReport:
    """What a shadow has seen so far.

    Attributes:
        name: The second backend.
        steps: Passes so far.
        checked: Those that were looked at.
        skipped: Why others that were due were not → how many.
        diverged: Passes with a divergence.
        first: The first divergence of all.
        closest: The part that came closest to its limit without a divergence.
        margin: Its difference in units of its limit.
    """

    name: str
    steps: int = 0
    checked: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    diverged: int = 0
    first: Divergence | None = None
    closest: str = ""
    margin: float = 0.0

    def __str__(self) -> str:
        head = f"shadow {self.name}: {self.checked} of {self.steps} steps checked"
        rest = [f"{count} skipped ({why})" for why, count in self.skipped.items()]
        if self.first is None:
            rest.append("none diverged")
        else:
            rest.append(f"{self.diverged} diverged, first {self.first}")
        if self.closest:
            rest.append(f"closest otherwise: {self.closest} at {self.margin:.2f} of its limit")
        return "; ".join([head, *rest])


class Shadow:
    """Looks at some passes of one runner.

    Args:
        runner: The first backend's.
        shadow: The second's, with the same weights, eager and not fused.
        rate: Share of passes that are looked at, above 0 and at most 1.

    Attributes:
        report: What was seen.
    """

    def __init__(self, runner: ModelRunner, shadow: ModelRunner, rate: float) -> None:
        self._runner = runner
        self._shadow = shadow
        self._rate = rate
        self._credit = 1.0
        self._fused = _fused_forms(runner)
        self.report = ShadowReport(name=shadow.bound.name)

    def due(self) -> bool:
        """Count one pass; whether it is to be looked at."""
        self.report.steps += 1
        due = self._credit >= 1.0
        self._credit += self._rate - due
        return due

    def run(self, batch: ForwardBatch) -> LogitsOutput | None:
        """Run a pass on both; the first backend's output, ``None`` if it was not looked at.

        Waits for both devices.
        """
        reason = self._too_large(batch)
        if reason or not batch.num_tokens:
            self.report.skipped[reason or "nothing to compute"] += 1
            return None
        copy = self._copy_state(batch)
        device = self._shadow.bound.runtime.device
        leader, own = Trace(device=device), Trace(device=device)
        output = self._traced(self._runner, batch, leader, None)
        self._traced(self._shadow, copy, own, leader)
        self.report.checked += 1
        self._compare(batch, leader, own)
        return output

    def shutdown(self) -> None:
        """Give the second backend back."""
        self._shadow.bound.shutdown()

    def _traced(
        self, runner: ModelRunner, batch: ForwardBatch, trace: Trace, leader: Trace | None
    ) -> LogitsOutput:
        pool, attention = runner.kv_pool, runner.attention
        with (
            runner.bound.runtime.inference_guard(),
            traced(runner.model, attention, pool, trace, leader),
        ):
            return runner.forward_extend(batch)

    def _too_large(self, batch: ForwardBatch) -> str:
        if batch.num_tokens > MOST_NEW_TOKENS:
            return f"more than {MOST_NEW_TOKENS} new tokens"
        page = self._shadow.plan.page_size
        pages = sum(-(-int(length) // page) for length in batch.seq_lens_cpu)
        held = self._shadow.kv_pool.num_tokens
        return f"more than {held} tokens in all" if pages * page > held else ""

    def _copy_state(self, batch: ForwardBatch) -> ForwardBatch:
        """The batch on the shadow's device, whose cache gets the requests' past."""
        lengths = batch.seq_lens_cpu.tolist()
        new = [1] * len(lengths) if batch.extend is None else batch.extend.seq_lens_cpu.tolist()
        rows = batch.req_pool_indices.tolist()
        device = self._shadow.bound.runtime.device
        table = self._shadow.req_to_token_pool.req_to_token
        first = page = self._shadow.plan.page_size  # page 0 belongs to padding
        fresh = []
        for place, (row, length, count) in enumerate(zip(rows, lengths, new, strict=True)):
            slots = torch.arange(first, first + length, device=device)
            table[place + 1, :length] = slots.to(table.dtype)
            self._copy_past(row, slots[: length - count])
            fresh.append(slots[length - count :])
            first += -(-length // page) * page
        return _moved(batch, torch.cat(fresh).to(batch.out_cache_loc.dtype), device)

    def _copy_past(self, row: int, slots: Tensor) -> None:
        """Keys and values of one request's first tokens, to other slots of the other cache."""
        source, target = self._runner.kv_pool, self._shadow.kv_pool
        table = self._runner.req_to_token_pool.req_to_token
        theirs = table[row, : len(slots)].long()
        for call in self._runner.spec.calls if len(slots) else ():
            if call.alias_of is None:
                k = source.key(call.call_id)[theirs].to(slots.device)
                v = source.value(call.call_id)[theirs].to(slots.device)
                target.write(call.call_id, slots, k, None if call.value_in_key else v)

    def _compare(self, batch: ForwardBatch, leader: Trace, own: Trace) -> None:
        first = None
        for part, gap in _gaps(leader, own):
            if RotarySite.pattern in self._fused.get(part, {}):
                continue  # nobody reads its result any more
            if not gap.ok:
                first = first or self._divergence(batch, part, gap)
            elif gap.share > self.report.margin:
                self.report.closest, self.report.margin = part, gap.share
        if first is None:
            return
        self.report.diverged += 1
        if self.report.first is None:
            self.report.first = first
            _log.warning("shadow %s diverges at %s", self.report.name, first)

    def _divergence(self, batch: ForwardBatch, part: str, gap: Gap) -> Divergence:
        return Divergence(
            step=self.report.steps,
            mode=batch.mode.name,
            part=part,
            gap=gap,
            served_by="; ".join(self._fused.get(part, {}).values()),
        )


def open_shadow(runner: ModelRunner) -> Shadow | None:
    """The shadow that the runner's settings ask for, if they do; records ``shadow``.

    It loads the same checkpoint again; weights that are updated later do not reach it.

    Raises:
        ConfigError: The second backend cannot run the model as the first does.
        BackendError: It cannot run here.
    """
    name = runner.config.shadow
    if name is None:
        return None
    if name == "auto" or "," in name:
        raise ConfigError(f"shadow is '{name}', but must be one backend. Name it: --shadow cpu")
    with runner.decisions.choosing("shadow") as decide:
        candidate = Candidate(name=name, verdict="chosen", reason="asked for")
        decide(Decision(point="shadow", chosen=name, candidates=(candidate,)))
    config = replace(
        runner.config,
        backend=name,
        dtype=runner.plan.dtype,
        kv_dtype=runner.plan.kv_dtype,
        page_size=None,
        max_total_tokens=min(MOST_TOKENS, runner.kv_pool.num_tokens),
        max_context_len=runner.plan.max_context_len,
        max_running_requests=runner.plan.max_running_requests,
        attention=None,
        graphs=False,
        fusion="off",
        shadow=None,
        sources={},
    )
    decisions = DecisionLog()
    bound = open_backend(
        BackendRequest(text=name, source="--shadow"),
        config=config,
        reference_ops=OPERATIONS,
        decisions=decisions,
        # Nobody's overrides: they are among what is looked at.
        allowed=PluginFilter(allow=frozenset({name.partition(":")[0]})),
    )
    try:
        bound.attention_providers.register(reference_provider)
        second = ModelRunner(bound.config, bound, decisions)
        second.initialize()
    except BaseException:
        bound.shutdown()
        raise
    return Shadow(runner, second, runner.config.shadow_rate)


def _fused_forms(runner: ModelRunner) -> dict[str, dict[str, str]]:
    """Path of a module → pattern that is in use there → who works in it."""
    found: dict[str, dict[str, str]] = {}
    for decision in runner.decisions:
        if decision.chosen == "fused":
            path, _, pattern = decision.point.removeprefix("fusion.").rpartition(".")
            found.setdefault(path, {})[pattern] = decision.candidates[0].reason
    return found


def _gaps(leader: Trace, own: Trace) -> Iterator[tuple[str, Gap]]:
    """(part, gap) of everything comparable, in the order in which the shadow's parts end."""
    for part, want in own.gave.items():
        if part in own.given and part[0].endswith(".attention"):
            yield from _head_gaps(part, leader, own)
        if part in leader.gave and own.given.get(part) != ():
            yield _named(part), gap_between(leader.gave[part], want, slack=SLACK)


def _head_gaps(part: Part, leader: Trace, own: Trace) -> Iterator[tuple[str, Gap]]:
    pairs = zip(leader.given.get(part, ()), own.given[part], strict=False)
    for name, (got, want) in zip(("queries", "keys", "values"), pairs, strict=False):
        if got is not None and want is not None:
            place = _named(part).removesuffix(".attention")
            yield f"{place}.{name}", gap_between(got, want, slack=SLACK)


def _named(part: Part) -> str:
    path, ordinal = part
    return path if not ordinal else f"{path} (call {ordinal + 1})"


def _moved(batch: ForwardBatch, slots: Tensor, device: torch.device) -> ForwardBatch:
    """The batch on another device, with rows 1 … B and other slots."""
    extend = batch.extend
    if extend is not None:
        extend = ExtendPart(
            seq_lens=extend.seq_lens.to(device),
            prefix_lens=extend.prefix_lens.to(device),
            start_loc=extend.start_loc.to(device),
            seq_lens_cpu=extend.seq_lens_cpu,
            prefix_lens_cpu=extend.prefix_lens_cpu,
        )
    rows = batch.logits_rows
    return replace(
        batch,
        input_ids=batch.input_ids.to(device),
        positions=batch.positions.to(device),
        req_pool_indices=torch.arange(
            1, batch.batch_size + 1, dtype=torch.int32, device=device
        ),
        seq_lens=batch.seq_lens.to(device),
        out_cache_loc=slots,
        logits_rows=None if rows is None else rows.to(device),
        page_table=None,
        extend=extend,
        prefix_chunks=None,
    )
