# SPDX-License-Identifier: Apache-2.0
"""GraphRunner: the whole generic life of recorded graphs.

Buckets largest first, static slots, warm-ups, capture, choice of a graph for a batch, replay.
A backend subclasses it and adds the few device primitives at the top of the class; nothing
here knows a device.  Used by ``runner`` (replay) and by backends (as a base class).

Results of a replay are views of the graph's memory: read them before the next replay.
"""

from __future__ import annotations

__all__ = ["GraphRunner"]

import logging
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from bedplate.batch.forward_batch import ForwardBatch
from bedplate.batch.forward_mode import CaptureHiddenMode, ForwardMode
from bedplate.contract.decisions import Candidate, Decision, Support
from bedplate.errors import CaptureError, ContractError, ReplayError
from bedplate.graph.buckets import pad_to
from bedplate.graph.capture_state import freeze_gc, model_capture_mode, pause_gc
from bedplate.graph.keys import GraphStats, Refusal, ShapeKey
from bedplate.graph.pool import (
    get_global_graph_memory_pool,
    set_global_graph_memory_pool,
    shared_slot_buffers,
)
from bedplate.graph.routes import Captured, Route
from bedplate.graph.slots import SlotRegistry, decode_slots

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from bedplate.batch.logits import LogitsOutput
    from bedplate.contract.graph import GraphRunnerRequest

logger = logging.getLogger(__name__)

_WARM_UPS = 2
"""Eager runs before a capture: the first loads kernels, the second settles allocators."""

_YES = Support.yes()
_NO = {refusal: Support.no(refusal) for refusal in Refusal}


class GraphRunner(ABC):
    """Captures one graph per bucket and hidden mode, and replays the one that fits a batch.

    Attributes:
        mode: Kind of pass that is captured.
        tokens_per_request: K, new tokens of each request in such a pass.
        request: What the runner was made from.
        stats: Replays and refusals so far.
        memory_bytes: Device memory that slots and graphs took, as measured by ``capture``.
        generation: Captures so far; each leaves the slots as padding.
    """

    mode: ClassVar[ForwardMode] = ForwardMode.DECODE
    tokens_per_request: ClassVar[int] = 1

    def __init__(self, request: GraphRunnerRequest) -> None:
        _check(request)
        self.request = request
        self.stats = GraphStats()
        self.memory_bytes = 0
        self.generation = 0
        self._attention = request.attention
        self._has_pages = request.max_pages > 1
        self._slots: SlotRegistry | None = None
        self._graphs: dict[ShapeKey, Captured] = {}
        self._failed: set[ShapeKey] = set()
        self._routes: dict[tuple[int, int, tuple[int, ...]], Route] = {}
        self._waiting: list[ShapeKey] = []
        self._resident: dict[int, ForwardBatch] = {}

    # What a backend adds.

    @abstractmethod
    def create_graph(self, key: ShapeKey) -> Any:
        """Make an empty graph object. Required; called once per capture, before warm-ups."""

    @abstractmethod
    def capture_graph(self, graph: Any, run: Callable[[], LogitsOutput]) -> LogitsOutput:
        """Record one call of ``run``, its memory from ``self.pool``. Required.

        Returns:
            What ``run`` returned; each replay writes the same tensors again.
        """

    @abstractmethod
    def replay_graph(self, graph: Any) -> LogitsOutput | None:
        """Launch the graph on the current stream and return at once. Required.

        Returns:
            ``None``, or the output where it does not lie where the capture put it.
        """

    def update_host_parameters(self, graph: Any, batch: ForwardBatch) -> None:  # noqa: B027
        """Renew host values that the capture baked in. Optional; before each replay.

        Args:
            graph: The graph about to be replayed.
            batch: The padded batch over the static slots, lengths on the host included.
        """

    def pool_handle(self) -> Any | None:
        """A handle for one memory pool that all graphs of the device share. Optional."""
        return None

    def capture_stream(self) -> AbstractContextManager[object]:
        """Context around a whole ``capture``, such as a side stream. Optional."""
        return nullcontext()

    # What the core does with it.

    @property
    def pool(self) -> Any | None:
        """The shared pool's handle; made when first asked for."""
        runtime = self.request.runtime
        handle = get_global_graph_memory_pool(runtime)
        if handle is None:
            handle = self.pool_handle()
            set_global_graph_memory_pool(runtime, handle)
        return handle

    @property
    def captured(self) -> tuple[ShapeKey, ...]:
        """Keys of all graphs, in order of capture."""
        return tuple(self._graphs)

    def capture(self, first: Collection[int] | None = None) -> None:
        """Capture every bucket in every hidden mode, largest first, replacing older graphs.

        A pool block made for the largest serves all others.  A graph that cannot be captured
        is recorded as a decision; a larger one serves its batches, or they run eagerly.

        Args:
            first: Buckets to capture now, the largest always among them; the others wait for
                ``capture_next``, and larger ones serve their batches until then. All, if not
                given.
        """
        self.release()
        request = self.request
        before = request.runtime.memory().free_bytes
        largest = request.capture_sizes[-1]
        keys = self._keys()
        now = [k for k in keys if first is None or k.batch_size in (largest, *first)]
        self._waiting = [key for key in keys if key not in now]
        with freeze_gc(bool(request.options.get("enable_gc", False))), self.capture_stream():
            for done, key in enumerate(now, start=1):
                self._try_capture(key)
                if request.progress is not None:
                    request.progress(done, len(now))
        request.runtime.empty_cache()
        self.memory_bytes = max(0, before - request.runtime.memory().free_bytes)

    def rehearse(self, sizes: Collection[int]) -> None:
        """Run what some buckets record, once and without recording, for its kernels alone.

        Args:
            sizes: Buckets.
        """
        runtime = self.request.runtime
        self._static_slots().reset()
        with model_capture_mode(), runtime.inference_guard():
            for key in self._keys():
                if key.batch_size in sizes:
                    batch = self._static_batch(key.batch_size, key.hidden_mode)
                    self._attention.prepare(batch)
                    self._recorded_part(batch)

    def capture_next(self, size: int | None = None) -> bool:
        """Capture one graph of those that wait; between passes, when there is time.

        Args:
            size: The bucket of batches of this size, if it waits; else nothing is done.

        Returns:
            Whether any still waits.
        """
        waiting = self._waiting
        if size is not None:
            bucket = pad_to(size, self.request.capture_sizes)
            waiting = [key for key in waiting if key.batch_size == bucket]
        if waiting:
            key = waiting[0]
            self._waiting.remove(key)
            with pause_gc(), self.capture_stream():
                self._try_capture(key)
        return bool(self._waiting)

    def resident(self, num_requests: int) -> ForwardBatch:
        """The batch that the first rows of the slots are, for who keeps them up to date there.

        ``replay`` loads nothing for it. The same object on every call.
        """
        batch = self._resident.get(num_requests)
        if batch is None:
            batch = self._static_batch(num_requests, CaptureHiddenMode.NULL)
            self._resident[num_requests] = batch
        return batch

    def capture_one_batch_size(self, key: ShapeKey) -> Captured:
        """Capture one graph on a dummy batch: row 0, slot 0, the attention's fill length.

        Returns:
            The graph, which serves its bucket from now on.

        Raises:
            CaptureError: Whatever failed; nothing is kept of the attempt.
        """
        try:
            captured = self.record(key, lambda: self._dummy(key), self._recorded_part)
        finally:
            self.generation += 1
        self._graphs[key] = captured
        self._failed.discard(key)
        self._routes.clear()
        return captured

    def record(
        self,
        key: ShapeKey,
        make_batch: Callable[[], ForwardBatch],
        run: Callable[[ForwardBatch], LogitsOutput],
    ) -> Captured:
        """Record a pass, after warm-ups; within ``capture_stream``.

        Args:
            key: What the graph is for.
            make_batch: The dummy batch, over the addresses that replays will read.
            run: What is recorded, given that batch.

        Raises:
            CaptureError: Whatever failed; the graph and its pool are not to be used again.
        """
        runtime = self.request.runtime
        try:
            batch = make_batch()
            with model_capture_mode(), runtime.inference_guard():
                graph = self.create_graph(key)
                self._attention.prepare(batch)
                for _ in range(_WARM_UPS):
                    runtime.synchronize()
                    run(batch)
                output = self.capture_graph(graph, partial(run, batch))
        except Exception as error:
            # A device may go on recording into the pool of a capture that broke off, and
            # refuse the next one that names it: that one gets a pool of its own.
            set_global_graph_memory_pool(runtime, None)
            raise _capture_error(key, error) from error
        return Captured(key, graph, batch, output)

    def play(self, captured: Captured) -> LogitsOutput | None:
        """Launch a graph over what its batch holds now, within ``inference_guard``.

        Returns:
            ``None``, or the output where it does not lie where the capture put it.
        """
        self.update_host_parameters(captured.graph, captured.batch)
        return self.replay_graph(captured.graph)

    def can_run(self, batch: ForwardBatch) -> Support:
        """Whether a graph can serve ``batch``; a refusal is counted under its reason."""
        found = self._find(batch)
        if isinstance(found, Route):
            return _YES
        self.stats.refusals[found] += 1
        return _NO[found]

    def bucket_of(self, batch: ForwardBatch) -> int | None:
        """Requests of the graph that serves ``batch``; ``None`` if none does."""
        found = self._find(batch)
        return found.captured.key.batch_size if isinstance(found, Route) else None

    def replay_prepare(self, batch: ForwardBatch) -> Route:
        """Load the slots and prepare attention, padded: all that precedes the launch.

        Raises:
            ReplayError: ``can_run`` refuses the batch.
        """
        route = self._find(batch)
        if not isinstance(route, Route):
            raise _replay_error(batch, route)
        captured = route.captured
        if batch is not self._resident.get(batch.batch_size):
            self._static_slots().load(batch, route.num_requests, captured.key.batch_size)
        self._attention.prepare(captured.batch)
        return route

    def replay(self, batch: ForwardBatch) -> LogitsOutput:
        """Run a batch that ``can_run`` accepted, within ``runtime.inference_guard()``.

        Returns:
            Logits ``[B·K, V]`` and hidden states of the real rows, as views of the graph's
            memory: valid until the next replay of any graph that shares the pool.

        Raises:
            ReplayError: ``can_run`` refuses the batch.
        """
        route = self.replay_prepare(batch)
        captured = route.captured
        fresh = self.play(captured)
        self.stats.replays[captured.key.batch_size] += 1
        return route.output if fresh is None else route.cut(fresh)

    def release(self) -> None:
        """Drop graphs, outputs and slots, and give their memory back to the device."""
        self._routes.clear()
        self._graphs.clear()
        self._failed.clear()
        self._waiting.clear()
        self._resident.clear()
        self._slots = None
        self.memory_bytes = 0
        self.request.runtime.empty_cache()

    def _static_slots(self) -> SlotRegistry:
        if self._slots is None:
            self._slots = self._make_slots()
        return self._slots

    def _make_slots(self) -> SlotRegistry:
        request = self.request
        specs = decode_slots(
            seq_len_fill=self._attention.seq_len_fill_value,
            index_dtype=getattr(torch, request.index_dtype),
            max_pages=request.max_pages,
        )
        return SlotRegistry(
            specs,
            sizes=request.capture_sizes,
            tokens_per_request=self.tokens_per_request,
            device=request.runtime.device,
            shared=shared_slot_buffers(request.runtime),
        )

    def _keys(self) -> list[ShapeKey]:
        modes = sorted(self.request.hidden_modes)
        return [
            self._key(size, hidden)
            for size in reversed(self.request.capture_sizes)
            for hidden in modes
        ]

    def _key(self, size: int, hidden: CaptureHiddenMode) -> ShapeKey:
        ints = self._attention.graph_key(self._static_batch(size, hidden))
        return ShapeKey(mode=self.mode, batch_size=size, hidden_mode=hidden, host_ints=ints)

    def _static_batch(self, size: int, hidden: CaptureHiddenMode) -> ForwardBatch:
        views: dict[str, Any] = {**self._static_slots().view(size)}
        return ForwardBatch(mode=self.mode, batch_size=size, capture_hidden=hidden, **views)

    def _dummy(self, key: ShapeKey) -> ForwardBatch:
        """The batch of a capture: nothing but padding."""
        self._static_slots().reset()
        return self._static_batch(key.batch_size, key.hidden_mode)

    def _recorded_part(self, batch: ForwardBatch) -> LogitsOutput:
        if self.request.begin is not None:
            self.request.begin(batch)
        self._attention.prepare_in_graph(batch)
        output: LogitsOutput = self.request.forward(batch)
        return output

    def _try_capture(self, key: ShapeKey) -> None:
        try:
            self.capture_one_batch_size(key)
        except CaptureError as error:
            self._failed.add(key)
            larger = [k.batch_size for k in self._graphs if k.batch_size > key.batch_size]
            self.request.record(_dropped(key, error, min(larger, default=None)))
            logger.warning("batches of %d have no graph: %s", key.batch_size, error.message)

    def _find(self, batch: ForwardBatch) -> Route | Refusal:
        """The graph for ``batch``, or the first reason against all of them."""
        if not self._graphs:
            return Refusal.CAPTURE_FAILED if self._failed else Refusal.NOT_CAPTURED
        size = batch.batch_size
        if batch.mode is not self.mode:
            return Refusal.MODE
        if size == 0:
            return Refusal.EMPTY
        if batch.input_ids.shape[-1] != size * self.tokens_per_request:
            return Refusal.TOKENS_PER_REQUEST
        if batch.logits_rows is not None:
            return Refusal.LOGITS_ROWS
        if (batch.page_table is not None) != self._has_pages:
            return Refusal.PAGE_TABLE
        ints = self._attention.graph_key(batch)
        known = (size, int(batch.capture_hidden), ints)
        route = self._routes.get(known)
        if route is not None:
            return route
        found = self._choose(size, batch.capture_hidden, ints)
        if isinstance(found, Route):
            self._routes[known] = found
        return found

    def _choose(
        self, size: int, hidden: CaptureHiddenMode, ints: tuple[int, ...]
    ) -> Route | Refusal:
        if pad_to(size, self.request.capture_sizes) is None:
            return Refusal.TOO_LARGE
        keys = [k for k in (*self._graphs, *self._failed) if k.batch_size >= size]
        keys = [k for k in keys if k.hidden_mode >= hidden]
        if not keys:
            return Refusal.HIDDEN_MODE
        keys = [k for k in keys if k.host_ints == ints]
        if not keys:
            return Refusal.HOST_INTEGERS
        keys = [k for k in keys if k in self._graphs]
        if not keys:
            return Refusal.CAPTURE_FAILED
        best = min(keys, key=lambda k: (k.batch_size, k.hidden_mode))
        return Route(self._graphs[best], size, hidden, self.tokens_per_request)


def _check(request: GraphRunnerRequest) -> None:
    """Refuse a request that no runner could serve.

    Raises:
        ContractError: Sizes are not ascending positive numbers, no hidden mode is given, or
            the index type is not an integer type of the vocabulary.
    """
    sizes = request.capture_sizes
    if not sizes or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
        raise ContractError(
            f"capture sizes must be ascending positive numbers, got {sizes}; take them from "
            "bedplate.graph.buckets.capture_sizes"
        )
    if not request.hidden_modes:
        raise ContractError("no hidden mode to capture; give CaptureHiddenMode.NULL at least")
    if request.index_dtype not in ("int32", "int64"):
        raise ContractError(
            f"index dtype must be int32 or int64, got {request.index_dtype!r}; correct the "
            "backend's MemoryCapabilities.index_dtype"
        )


def _capture_error(key: ShapeKey, error: Exception) -> CaptureError:
    cause = str(error).partition("\n")[0].rstrip(".")
    return CaptureError(
        f"capturing a graph for {key} failed: {type(error).__name__}: {cause}. Capture fewer "
        "or smaller sizes, leave more memory free, or run without graphs",
        key=key,
    )


def _replay_error(batch: ForwardBatch, reason: Refusal) -> ReplayError:
    return ReplayError(
        f"no graph can serve this batch of {batch.batch_size} requests ({reason}); ask "
        "can_run first and run it eagerly",
        reason=reason,
    )


def _dropped(key: ShapeKey, error: CaptureError, larger: int | None) -> Decision:
    """The record of a graph that could not be captured, and of what serves its batches."""
    hidden = f".{key.hidden_mode.name.lower()}" if key.hidden_mode.need_capture() else ""
    instead = Candidate(name="eager", verdict="chosen", reason="needs no capture")
    if larger is not None:
        reason = "its batches are padded further"
        instead = Candidate(name=f"graph for {larger}", verdict="chosen", reason=reason)
    return Decision(
        point=f"graph.{key.batch_size}{hidden}",
        chosen=instead.name,
        candidates=(Candidate(name="graph", verdict="failed", reason=error.message), instead),
    )
