# SPDX-License-Identifier: Apache-2.0
"""PromptGraphs: recorded passes with several new tokens per request.

A prompt of a thousand tokens keeps a fast device busy for less time than the host needs to
launch its kernels one by one.  So passes are recorded for some numbers of tokens, and a pass
is padded to the next: its spare tokens go to slot 0, its spare requests have no new tokens.
That the recorded kernels then serve any lengths is the attention's promise,
``AttentionBackend.extend_recordable``.

The device's part is that of the ``GraphRunner`` for decode passes, whose pool is shared.

Shapes: T new tokens, B requests, R rows of logits; a graph has T and B of its own.
"""

from __future__ import annotations

__all__ = ["MOST_REQUESTS", "PromptGraphs", "prompts_decision", "token_sizes"]

import logging
from collections import Counter
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
from bedplate.batch.forward_mode import ForwardMode
from bedplate.batch.logits import LogitsOutput
from bedplate.contract.decisions import Candidate, Decision, Support
from bedplate.errors import CaptureError, ReplayError
from bedplate.graph.buckets import pad_to
from bedplate.graph.capture_state import freeze_gc, model_capture_mode, pause_gc
from bedplate.graph.keys import GraphStats, Refusal, ShapeKey

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from bedplate.graph.routes import Captured
    from bedplate.graph.runner import GraphRunner

logger = logging.getLogger(__name__)

MOST_REQUESTS = 64
"""Requests of a recorded pass; its head computes the logits of so many rows."""
LARGEST = 4096
"""Most tokens of a recorded pass; more would take much memory for little gain."""
_HOST_SHARE = 0.8
"""Least share of the host in an eager pass that is worth recording."""

_SMALLEST = 32
_SHARE = 0.75
"""Least share of real tokens in a padded pass, beyond the smallest size."""

_WARM_UPS = 2
"""Eager passes before one is timed."""
_MISSED_PASSES = 4
"""Passes of a size that run eagerly before it is recorded amid work: that costs three."""

_TOKENS = ("input_ids", "positions", "out_cache_loc")
_REQUESTS = ("req_pool_indices", "seq_lens", "seq_lens_cpu")
_EXTEND = ("seq_lens", "prefix_lens", "start_loc", "seq_lens_cpu", "prefix_lens_cpu")


def token_sizes(limit: int) -> tuple[int, ...]:
    """Numbers of tokens to record, ascending: powers of two, and steps of a quarter between.

    Args:
        limit: Most tokens of a pass; the last size, if no larger than ``LARGEST``.
    """
    most = min(limit, LARGEST)
    sizes = {most}
    size = _SMALLEST
    while size <= most:
        quarters = (4, 5, 6, 7) if size >= 256 else (4, 6) if size >= 128 else (4,)
        sizes |= {size * part // 4 for part in quarters}
        size *= 2
    return tuple(sorted(size for size in sizes if size <= most))


def prompts_decision(prompts: PromptGraphs | None, why_not: str) -> Decision:
    """Which prompt passes are recorded, or why none is."""
    if prompts is not None:
        reason = f"{len(prompts.sizes)} sizes, up to {prompts.sizes[-1]:,} tokens"
        return Decision(
            point="prompt_graphs",
            chosen="on",
            candidates=(Candidate(name="on", verdict="chosen", reason=reason),),
            detail={"tokens": ", ".join(map(str, prompts.sizes))},
        )
    return Decision(
        point="prompt_graphs",
        chosen="off",
        candidates=(
            Candidate(name="on", verdict="refused", reason=why_not),
            Candidate(name="off", verdict="chosen", reason="prompts run eagerly"),
        ),
    )


class PromptGraphs:
    """One graph per number of tokens, over slots of their own.

    Args:
        runner: Records and launches; its request names runtime and attention.
        forward: Runs the model on a prepared batch.
        sizes: Numbers of tokens to record, ascending.
        max_requests: Most requests of a pass.
        longest: Most new tokens of one request; all of a pass when not given.

    Attributes:
        sizes: As given.
        stats: Replays by size, and refusals, so far.
    """

    def __init__(
        self,
        runner: GraphRunner,
        forward: Callable[[ForwardBatch], LogitsOutput],
        *,
        sizes: tuple[int, ...],
        max_requests: int,
        longest: int | None = None,
    ) -> None:
        self.sizes = sizes
        self._longest = longest or sizes[-1]
        self.stats = GraphStats()
        self._runner = runner
        self._forward = forward
        self._attention = runner.request.attention
        self._slots = _make_slots(runner, sizes[-1], min(max_requests, MOST_REQUESTS))
        self._graphs: dict[int, Captured] = {}
        self._waiting: list[int] = []
        self._padded: Counter[int] = Counter()

    @property
    def captured(self) -> tuple[int, ...]:
        """Sizes that are recorded, ascending."""
        return tuple(sorted(self._graphs))

    def capture(self, first: Sequence[int]) -> None:
        """Record some sizes, the largest first; the others wait for ``capture_next``.

        If one cannot be recorded no other is tried: what a pass does is the same in all.
        """
        self._waiting = [size for size in self.sizes if size not in first]
        with freeze_gc(), self._runner.capture_stream():
            for size in sorted(first, reverse=True):
                if not self._try_capture(size):
                    return

    def worth_it(self) -> tuple[int, ...]:
        """The sizes whose eager pass waits for the host, by the clock; ascending.

        Where the device is busy for longer than the host needs to launch, a graph gains
        nothing and its memory is lost.
        """
        for index in reversed(range(len(self.sizes))):
            launched, done = self._time_eager(self.sizes[index])
            if launched >= _HOST_SHARE * done:
                return self.sizes[: index + 1]
        return ()

    def _time_eager(self, size: int) -> tuple[float, float]:
        """Seconds until an eager pass is launched, and until it is done; kernels are ready."""
        runtime, batch = self._runner.request.runtime, self._dummy(size)
        begin = launched = 0.0
        with runtime.inference_guard():
            for _ in range(_WARM_UPS + 1):
                runtime.synchronize()
                begin = perf_counter()
                self._attention.prepare(batch)
                self._run(batch)
                launched = perf_counter() - begin
            runtime.synchronize()
        return launched, perf_counter() - begin

    def rehearse(self) -> None:
        """Run what is to be recorded once, without recording, for its kernels alone."""
        with model_capture_mode(), self._runner.request.runtime.inference_guard():
            for size in self.sizes:
                batch = self._dummy(size)
                self._attention.prepare(batch)
                self._run(batch)

    def capture_next(self) -> bool:
        """Record a size that waits, between passes; whether any still waits."""
        if self._waiting:
            with pause_gc(), self._runner.capture_stream():
                self._try_capture(self._waiting.pop())
        return bool(self._waiting)

    def capture_if_worth_it(self, batch: ForwardBatch) -> None:
        """Record the waiting size of ``batch`` once it has been missed often enough."""
        size = pad_to(batch.num_tokens, self.sizes)
        if size in self._waiting and self._find(batch) is Refusal.PADDING:
            self._padded[size] += 1
            if self._padded[size] == _MISSED_PASSES:
                self._waiting.remove(size)
                with pause_gc(), self._runner.capture_stream():
                    self._try_capture(size)

    def can_run(self, batch: ForwardBatch) -> Support:
        """Whether a graph can serve ``batch``; a refusal is counted under its reason."""
        found = self._find(batch)
        if not isinstance(found, Refusal):
            return Support.yes()
        self.stats.refusals[found] += 1
        return Support.no(found)

    def bucket_of(self, batch: ForwardBatch) -> int | None:
        """Tokens of the graph that serves ``batch``; ``None`` if none does."""
        found = self._find(batch)
        return None if isinstance(found, Refusal) else found.key.num_tokens

    def replay(self, batch: ForwardBatch) -> LogitsOutput:
        """Run a batch that ``can_run`` accepted, within ``runtime.inference_guard()``.

        Returns:
            Logits ``[R, V]``, a view of the graphs' memory: valid until the next replay.

        Raises:
            ReplayError: ``can_run`` refuses the batch.
        """
        captured = self._find(batch)
        if isinstance(captured, Refusal):
            raise ReplayError(
                f"no graph can serve this batch of {batch.num_tokens} tokens ({captured}); ask "
                "can_run first and run it eagerly",
                reason=captured,
            )
        _load(captured.batch, batch)
        self._attention.prepare(captured.batch)
        output = self._runner.play(captured) or captured.output
        self.stats.replays[captured.key.num_tokens or 0] += 1
        assert batch.logits_rows is not None  # ``_find`` refuses others
        return LogitsOutput(
            next_token_logits=output.next_token_logits[: len(batch.logits_rows)]
        )

    def _run(self, batch: ForwardBatch) -> LogitsOutput:
        self._attention.prepare_in_graph(batch)
        return self._forward(batch)

    def _try_capture(self, size: int) -> bool:
        slots = self._slots
        key = ShapeKey(mode=slots.mode, batch_size=slots.batch_size, num_tokens=size)
        try:
            self._graphs[size] = self._runner.record(key, lambda: self._dummy(size), self._run)
        except CaptureError as error:
            self._waiting.clear()
            self._runner.request.record(_dropped(size, error))
            logger.warning("prompts run eagerly: %s", error.message)
            return False
        return True

    def _dummy(self, size: int) -> ForwardBatch:
        """The slots' first ``size`` tokens as few prompts, the first the longest, in slot 0.

        They have a prefix: attention may have another way for whole prompts, which is no way
        for the rest.
        """
        batch = _cut(self._slots, size)
        for tensor in _tensors(batch):
            tensor.zero_()
        assert batch.extend is not None
        starts = range(0, size, self._longest)
        counts = torch.tensor([min(self._longest, size - start) for start in starts])
        real = slice(len(counts))
        batch.extend.start_loc[real] = torch.tensor(starts)
        for lens in (batch.extend.seq_lens, batch.extend.seq_lens_cpu):
            lens[real] = counts
        for lens in (batch.extend.prefix_lens, batch.extend.prefix_lens_cpu):
            lens[real] = 1
        for lens in (batch.seq_lens, batch.seq_lens_cpu):
            lens[real] = counts + 1
        return batch

    def _find(self, batch: ForwardBatch) -> Captured | Refusal:
        count = batch.num_tokens
        if not self._graphs:
            return Refusal.NOT_CAPTURED
        if batch.mode not in (ForwardMode.EXTEND, ForwardMode.MIXED):
            return Refusal.MODE
        if not count:
            return Refusal.EMPTY
        if batch.batch_size > self._slots.batch_size or count > self.sizes[-1]:
            return Refusal.TOO_LARGE
        rows = batch.logits_rows
        if rows is None or len(rows) > self._slots.batch_size:
            return Refusal.LOGITS_ROWS
        if batch.capture_hidden.need_capture():
            return Refusal.HIDDEN_MODE
        if batch.page_table is not None or batch.prefix_chunks is not None:
            return Refusal.PAGE_TABLE
        size = min((s for s in self._graphs if s >= count), default=None)
        if size is None:
            return Refusal.NOT_CAPTURED
        if count < _SHARE * size and any(count <= waiting < size for waiting in self._waiting):
            return Refusal.PADDING
        return self._graphs[size]


def _make_slots(runner: GraphRunner, tokens: int, requests: int) -> ForwardBatch:
    """A batch over storage for ``tokens`` and ``requests``, all zeros."""
    request = runner.request
    device, slot = request.runtime.device, getattr(torch, request.index_dtype)

    def zeros(count: int, dtype: torch.dtype, place: torch.device | str = device) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=place)

    def lens(place: torch.device | str = device) -> Tensor:
        return zeros(requests, torch.int32, place)

    return ForwardBatch(
        mode=ForwardMode.EXTEND,
        batch_size=requests,
        input_ids=zeros(tokens, torch.int64),
        positions=zeros(tokens, torch.int64),
        out_cache_loc=zeros(tokens, slot),
        req_pool_indices=lens(),
        seq_lens=lens(),
        seq_lens_cpu=lens("cpu"),
        logits_rows=zeros(requests, torch.int64),
        extend=ExtendPart(
            seq_lens=lens(), prefix_lens=lens(), start_loc=lens(),
            seq_lens_cpu=lens("cpu"), prefix_lens_cpu=lens("cpu"),
        ),
    )  # fmt: skip


def _cut(slots: ForwardBatch, tokens: int) -> ForwardBatch:
    """The batch of the first ``tokens`` tokens, over the same storage."""
    views = {name: getattr(slots, name)[:tokens] for name in _TOKENS}
    return replace(slots, **views)


def _tensors(batch: ForwardBatch) -> list[Tensor]:
    """All tensors of a prompt batch: of tokens, of rows of logits, of requests."""
    assert batch.extend is not None
    assert batch.logits_rows is not None
    return [
        *(getattr(batch, name) for name in _TOKENS),
        batch.logits_rows,
        *(getattr(batch, name) for name in _REQUESTS),
        *(getattr(batch.extend, name) for name in _EXTEND),
    ]


def _load(slots: ForwardBatch, batch: ForwardBatch) -> None:
    """Copy ``batch`` into the first rows of the slots and zero the rest; a call per dtype.

    Zero is padding: slot 0, row 0, no new tokens.
    """
    copies: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for target, source in zip(_tensors(slots), _tensors(batch), strict=True):
        pairs = copies.setdefault((target.device, target.dtype), [])
        pairs.append((target, source))
    for pairs in copies.values():
        targets = [target[: len(source)] for target, source in pairs]
        torch._foreach_copy_(targets, [source for _, source in pairs])
        spare = [target[len(source) :] for target, source in pairs if len(target) > len(source)]
        if spare:
            torch._foreach_zero_(spare)


def _dropped(size: int, error: CaptureError) -> Decision:
    """The record of prompts that cannot be recorded."""
    return Decision(
        point=f"prompt_graph.{size}",
        chosen="eager",
        candidates=(
            Candidate(name="graph", verdict="failed", reason=error.message),
            Candidate(name="eager", verdict="chosen", reason="needs no capture"),
        ),
    )
