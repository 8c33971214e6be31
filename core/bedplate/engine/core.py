# SPDX-License-Identifier: Apache-2.0
"""EngineCore: the loop that plans passes, runs them, and delivers what they bring.

Made of parts, so that tests and benchmarks can drive it with nothing behind; ``Engine``
builds the parts from settings.  Any thread may add and abort requests; whoever calls
``step`` moves all of them on, one thread at a time.

A failure is contained: an error of one request ends that request; an exception of a pass ends
the requests of that pass; the others go on.
"""

from __future__ import annotations

__all__ = ["EngineCore"]

import logging
import threading
import time
from collections import deque
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from bedplate.contract.steps import StepStats
from bedplate.engine.admission import draw_seed, prompt_tokens
from bedplate.engine.outputs import StepResult
from bedplate.engine.track import Track
from bedplate.errors import ConfigError, InternalError
from bedplate.runner.sampling_params import SamplingParams
from bedplate.scheduling.request import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bedplate.batch.schedule_batch import ScheduleBatch
    from bedplate.batch.step import PendingStep, StepExecutor, StepOutput
    from bedplate.engine.outputs import Delta, RequestOutput
    from bedplate.engine.track import TextCodec
    from bedplate.scheduling.planned import Applied
    from bedplate.scheduling.request import FinishReason
    from bedplate.scheduling.scheduler import Scheduler

_log = logging.getLogger(__name__)
_NOTHING = np.zeros(0, np.int64)


class EngineCore:
    """See the module.

    Args:
        scheduler: Plans passes.
        executor: Runs them.
        eos_token_ids: Tokens that end a request unless it ignores them.
        tokenizer: Makes text; without it prompts must be token ids.
        vocab_size: Token ids of prompts must be below it; ``None`` does not check.
        seed: From which requests without a seed get theirs.
        observers: Told the statistics of every step; must not raise.
        explain_error: Adds a sentence to an exception of the device, or ``None``.

    Attributes:
        wake: Set when a request was added or aborted, for whoever sleeps until there is work.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        executor: StepExecutor,
        eos_token_ids: Sequence[int] = (),
        tokenizer: TextCodec | None = None,
        vocab_size: int | None = None,
        seed: int = 0,
        observers: Sequence[Callable[[StepStats], None]] = (),
        explain_error: Callable[[BaseException], str | None] | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._eos = tuple(eos_token_ids)
        self._codec = tokenizer
        self._vocab_size = vocab_size
        self._seed = seed
        self._observers = tuple(observers)
        self._explain = explain_error or (lambda _: None)
        self._depth = 1 if scheduler.overlap else 0
        self._lock = threading.Lock()
        self._numbers = count(1)
        self._steps = count(1)
        self._inbox: deque[Track | str] = deque()
        self._tracks: dict[str, Track] = {}
        self._watched: dict[str, Track] = {}
        self._pending: deque[tuple[PendingStep, int, int]] = deque()
        self._outputs: list[RequestOutput] = []
        self.wake = threading.Event()

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do anything."""
        return bool(self._tracks or self._inbox or self._pending or self._outputs)

    def add_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        sink: Callable[[Delta], None] | None = None,
        stream: bool = False,
    ) -> str:
        """Queue a request; any thread.

        Args:
            prompt: Text or token ids.
            params: Settings; greedy until the end of text by default.
            request_id: Name for it, not in use; chosen if not given.
            priority: Higher goes first.
            sink: Called, by the thread that steps, with the result in the last ``Delta``.
                It must not block; if it raises, the request fails.
            stream: Call ``sink`` with every new token before that, too.

        Returns:
            The request's name.

        Raises:
            ConfigError: The prompt is empty or holds no token ids, or the name is taken.
            RequestTooLongError: It cannot fit, even alone.
        """
        number = next(self._numbers)
        name = request_id if request_id is not None else f"request-{number}"
        track = Track(
            self._request(name, number, prompt, params or SamplingParams(), priority),
            self._codec,
            sink,
            stream=stream,
        )
        if self._tracks.setdefault(name, track) is not track:
            raise ConfigError(
                f"a request named {name!r} is running; choose another request_id, or none"
            )
        self._post(track)
        return name

    def abort(self, request_id: str) -> None:
        """End a request as soon as possible; any thread. Unknown names are ignored."""
        self._post(request_id)

    def step(self) -> StepResult:
        """Plan and launch one pass, and deliver one (with overlap: the one before).

        Raises:
            InternalError: There are requests, but none can be moved on.
        """
        with self._lock:
            self._read_inbox()
            begun = time.perf_counter_ns()
            batch = self._scheduler.next_batch()
            unset = self._announce()
            applied = None
            if batch is not None:
                applied = self._launch(batch, begun)
            elif self._scheduler.has_requests and not self._pending:
                raise InternalError(
                    f"{len(self._tracks)} requests wait, {self._scheduler.free_tokens} slots "
                    "are free, and no pass can be planned; please report it"
                )
            for request, error in unset:
                self._scheduler.finish(request, "error", error=error)
                self._close(request)
            if len(self._pending) > (self._depth if batch is not None else 0):
                applied = self._settle()
            return self._result(applied)

    def idle(self) -> bool:
        """Do a piece of what can wait, if there are no requests; whether more is to do."""
        with self._lock:
            return not self.has_work and self._executor.idle()

    def abort_all(self, error: str = "") -> list[RequestOutput]:
        """End every request and wait for passes in flight; with an ``error``, as failed."""
        reason: FinishReason = "error" if error else "abort"
        with self._lock:
            self._read_inbox()
            for track in list(self._tracks.values()):
                self._scheduler.finish(track.request, reason, error=error)
                self._close(track.request)
            while self._pending:
                self._settle()
            return self._take_outputs()

    def _request(
        self,
        name: str,
        number: int,
        prompt: str | Sequence[int],
        params: SamplingParams,
        priority: int,
    ) -> Request:
        tokens = prompt_tokens(prompt, self._codec, self._vocab_size)
        if params.stop and self._codec is None:
            raise ConfigError(
                "stop strings need text, and this engine has no tokenizer; use stop_token_ids"
            )
        if params.seed is None:
            params = replace(params, seed=draw_seed(self._seed, number))
        ends = params.stop_token_ids if params.ignore_eos else self._eos + params.stop_token_ids
        return Request(
            request_id=name,
            number=number,
            tokens=tokens,
            prompt_len=len(tokens),
            params=params,
            priority=priority,
            max_len=self._scheduler.limit_of(len(tokens), params.max_tokens),
            min_len=len(tokens) + max(params.min_tokens, 1),
            stop_ids=tuple(dict.fromkeys(ends)),
            arrived_s=time.monotonic(),
        )

    def _post(self, message: Track | str) -> None:
        """Leave a message for the next step, or read it now if none is under way."""
        self._inbox.append(message)
        self.wake.set()
        if self._lock.acquire(blocking=False):
            try:
                self._read_inbox()
            finally:
                self._lock.release()

    def _read_inbox(self) -> None:
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Track):
                self._scheduler.add(message.request)
                if message.watched:
                    self._watched[message.request.request_id] = message
            elif (track := self._tracks.get(message)) is not None:
                self._scheduler.finish(track.request, "abort")
                self._close(track.request)

    def _announce(self) -> list[tuple[Request, str]]:
        """Tell the executor about requests that got a row; returns those it refused."""
        refused = []
        for request in self._scheduler.admitted:
            try:
                self._executor.set_request(request.row, request.params, request.prompt_len)
            except Exception as error:  # whatever it is, it is this request's alone
                refused.append((request, self._describe(error)))
        return refused

    def _launch(self, batch: ScheduleBatch, begun: int) -> Applied | None:
        try:
            pending = self._executor.launch(batch)
        except Exception as error:  # a pass failed, the engine lives
            message = self._describe(error)
            while self._pending:  # earlier passes are well: take their tokens first
                self._settle()
            return self._deliver(self._scheduler.fail(message))
        self._pending.append((pending, begun, time.perf_counter_ns() - begun))
        return None

    def _settle(self) -> Applied:
        """Wait for the oldest pass and deliver what it brought."""
        pending, begun, planning = self._pending.popleft()
        try:
            output = pending.wait()
        except Exception as error:  # a pass failed, the engine lives
            return self._deliver(self._scheduler.fail(self._describe(error)))
        except BaseException:
            self._deliver(self._scheduler.fail("interrupted"))
            raise
        arrived = time.perf_counter_ns()
        applied = self._deliver(self._scheduler.apply(output))
        if self._observers:
            self._observe(applied, output, begun, planning, arrived)
        return applied

    def _deliver(self, applied: Applied) -> Applied:
        if self._watched:
            for track in list(self._watched.values()):
                if track.request.row:
                    self._push(track)
        for request in applied.finished:
            self._close(request)
        return applied

    def _push(self, track: Track) -> None:
        """Show a listener or the stop strings the new tokens of a running request."""
        request, table = track.request, self._scheduler.roster.table
        first = request.prompt_len + track.seen
        tokens = table.tokens[request.row, first : table.known_len[request.row]].tolist()
        if not tokens:
            return
        try:
            stop = track.push(tokens)
        except Exception as error:  # a tokenizer or a listener failed
            self._scheduler.finish(request, "error", error=self._describe(error))
            self._close(request)
        else:
            if stop is not None:
                self._scheduler.finish(request, "stop", stop)
                self._close(request)

    def _close(self, request: Request) -> None:
        """Deliver a finished request's result, once."""
        track = self._tracks.pop(request.request_id, None)
        self._watched.pop(request.request_id, None)
        if track is None:
            return
        try:
            output = track.close()
        except Exception as error:  # the tokenizer failed
            request.finish_reason, request.error = "error", self._describe(error)
            output = track.give_up()
        self._outputs.append(output)
        try:
            track.report(output)
        except Exception as error:  # the listener failed, and is the only one who cares
            self._describe(error)

    def _result(self, applied: Applied | None) -> StepResult:
        outputs = self._take_outputs()
        if applied is None:
            return StepResult(numbers=_NOTHING, token_ids=_NOTHING, outputs=outputs)
        return StepResult(numbers=applied.numbers, token_ids=applied.token_ids, outputs=outputs)

    def _take_outputs(self) -> list[RequestOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def _describe(self, error: BaseException) -> str:
        explanation = self._explain(error)
        text = f"{type(error).__name__}: {error}"
        details = error if _log.isEnabledFor(logging.DEBUG) else None
        _log.warning("%s", text, exc_info=details)
        return f"{text}. {explanation}" if explanation else text

    def _observe(
        self, applied: Applied, output: StepOutput, begun: int, planning: int, arrived: int
    ) -> None:
        planned, now = applied.planned, time.perf_counter_ns()
        stats = StepStats(
            step=next(self._steps),
            mode=planned.mode.name,
            num_requests=len(planned.rows),
            num_tokens=planned.num_tokens,
            graph=output.graph,
            graph_reason=output.graph_reason,
            host_us=(planning + now - arrived) / 1000,
            total_us=(now - begun) / 1000,
            free_tokens=self._scheduler.free_tokens,
            queued=self._scheduler.num_waiting,
        )
        for observer in self._observers:
            observer(stats)
