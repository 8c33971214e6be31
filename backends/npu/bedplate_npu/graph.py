# SPDX-License-Identifier: Apache-2.0
"""Recorded decode: the device primitives below the core's GraphRunner.

Lengths are host integers that a capture bakes in, so each replay is preceded by an update, and
the graph waits on the device until it has come.  An update must not begin before the replay
before it has taken its own: a fence after every replay is waited for.
"""

from __future__ import annotations

__all__ = ["NpuGraphRunner", "make_graph_runner"]

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from bedplate.contract import Candidate, Decision
from bedplate.errors import CaptureError, ConfigError, ReplayError
from bedplate.graph.runner import GraphRunner
from bedplate_npu.attention import FusedInferAttention
from bedplate_npu.runtime import NpuRuntime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.batch.logits import LogitsOutput
    from bedplate.contract import Event, GraphRunnerRequest
    from bedplate.graph.keys import ShapeKey

_NO_STREAM = ("207008", "207005", "stream resource")
"""What the runtime says when the device has no stream left."""
_INPUTS = ("input_ids", "positions", "out_cache_loc", "req_pool_indices", "seq_lens")


def make_graph_runner(request: GraphRunnerRequest) -> GraphRunner | None:
    """A runner, or ``None`` with a decision where the attention cannot be recorded.

    Raises:
        ConfigError: A variable of the process forbids captures, and graphs were asked for.
    """
    runtime = request.runtime
    assert isinstance(runtime, NpuRuntime)
    problem = runtime.graph_problem or runtime.off.get("graphs", "")
    if problem:
        raise ConfigError(f"Graphs were asked for, but {problem}")
    if isinstance(request.attention, FusedInferAttention):
        return NpuGraphRunner(request)
    name = type(request.attention).__name__
    reason = f"{name} reads lengths on the host, and a graph would keep those of its capture"
    eager = Candidate(name="eager", verdict="chosen", reason="needs no capture")
    refused = Candidate(name="graph", verdict="refused", reason=reason)
    request.record(
        Decision(point="graph.attention", chosen="eager", candidates=(refused, eager))
    )
    return None


class NpuGraphRunner(GraphRunner):
    """One NPU graph per bucket and hidden mode, all from one memory pool."""

    def __init__(self, request: GraphRunnerRequest) -> None:
        super().__init__(request)
        runtime, attention = request.runtime, request.attention
        assert isinstance(runtime, NpuRuntime)
        assert isinstance(attention, FusedInferAttention)
        self._runtime, self._fused = runtime, attention
        self._npu: Any = torch.get_device_module("npu")
        self._stream = self._npu.Stream(device=runtime.device)
        self._fence: Event | None = None
        self._no_more = ""
        self._made = 0
        self._addresses: dict[int, list[int]] = {}
        self._worker = _worker(runtime) if runtime.options.overlap_update else None
        self._updating: Future[None] | None = None

    def create_graph(self, key: ShapeKey) -> Any:
        """An empty graph, while the device has room for one.

        Raises:
            CaptureError: Streams ran out before, or the device takes no more graphs.
        """
        cap = self._runtime.max_graphs
        if cap is not None and self._made >= cap:
            self._no_more = f"{self._runtime.family} takes {cap} graphs"
        if self._no_more:
            raise CaptureError(f"{self._no_more}; this one was not tried")
        return self._npu.NPUGraph()

    def capture_graph(self, graph: Any, run: Callable[[], LogitsOutput]) -> LogitsOutput:
        """Record on the side stream, and see that every length can be renewed.

        Raises:
            CaptureError: A call was not recorded with the key under which it is updated.
        """
        try:
            with self._npu.graph(
                graph, pool=self.pool, stream=self._stream, auto_dispatch_capture=True
            ):
                output = run()
            _check_records(graph, self._fused.update_keys)
        except Exception as error:
            _leave_dispatch(graph)
            if any(sign in str(error) for sign in _NO_STREAM):
                self._no_more = "the device has no stream left"
            with suppress(RuntimeError):
                graph.reset()
            raise
        self._made += 1
        return output

    def update_host_parameters(self, graph: Any, batch: ForwardBatch) -> None:
        """Renew the lengths, once the previous replay has taken its own."""
        if self._runtime.options.check_addresses:
            self._check_addresses(graph, batch)
        inputs = self._fused.update_inputs(batch)
        if self._fence is not None:
            self._fence.synchronize()
        if self._worker is None:
            graph.update(cpu_update_input=inputs)
        else:
            self._updating = self._worker.submit(graph.update, cpu_update_input=inputs)

    def replay_graph(self, graph: Any) -> None:
        """Launch on the current stream, and leave a fence behind."""
        graph.replay()
        if self._updating is not None:
            self._updating.result()
        self._fence = self._runtime.record_event()

    def pool_handle(self) -> Any:
        """The pool of every graph of the device."""
        return self._npu.graph_pool_handle()

    @contextmanager
    def capture_stream(self) -> Iterator[None]:
        """The side stream, ordered after and before the current one: warm-ups run there too."""
        home = self._npu.current_stream()
        self._stream.wait_stream(home)
        with self._npu.stream(self._stream):
            yield
        home.wait_stream(self._stream)

    def release(self) -> None:
        """Drop graphs, after the last replay."""
        if self._fence is not None:
            self._fence.synchronize()
        self._fence, self._no_more, self._made = None, "", 0
        self._addresses.clear()
        super().release()

    def _check_addresses(self, graph: Any, batch: ForwardBatch) -> None:
        now = [getattr(batch, name).data_ptr() for name in _INPUTS]
        if self._addresses.setdefault(id(graph), now) != now:
            raise ReplayError(
                "an input of the graph has moved since its first replay, so the graph would "
                "read what nobody writes. Copy into the slots instead of replacing them"
            )


def _check_records(graph: Any, keys: tuple[str, ...]) -> None:
    """Every attention call is there, and has the keyword that its updates name.

    An unknown key is ignored by the library, and a graph would go on with old lengths.
    """
    records = graph.graph_dispatch_mode.graph_dispatch_records
    if len(records) != len(keys):
        raise CaptureError(
            f"{len(records)} calls with lengths were recorded where the model makes {len(keys)}"
        )
    for record, key in zip(records, keys, strict=True):
        if key not in record.kwargs:
            raise CaptureError(f"a recorded call has no {key}, so it could not be updated")


def _leave_dispatch(graph: Any) -> None:
    """Take off the dispatch mode that the library leaves in place when ending a capture fails.

    Every later call of attention would be recorded into the graph that was given up.
    """
    mode = graph.graph_dispatch_mode
    if any(active is mode for active in _get_current_dispatch_mode_stack()):
        mode.__exit__(None, None, None)


def _worker(runtime: NpuRuntime) -> ThreadPoolExecutor:
    """One thread on our device, for updates beside the launch."""
    module: Any = torch.get_device_module("npu")
    return ThreadPoolExecutor(
        1, "bedplate-npu-update", initializer=module.set_device, initargs=(runtime.device,)
    )
