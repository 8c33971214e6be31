# SPDX-License-Identifier: Apache-2.0
"""Recorded decode: the device primitives below the core's GraphRunner."""

from __future__ import annotations

__all__ = ["CudaGraphRunner"]

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from bedplate.graph.runner import GraphRunner
from bedplate_triton.recording import recording
from bedplate_triton.results import borrow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bedplate.batch.logits import LogitsOutput
    from bedplate.contract import GraphRunnerRequest
    from bedplate.graph.keys import ShapeKey


class CudaGraphRunner(GraphRunner):
    """One CUDA graph per bucket and hidden mode, all from one memory pool."""

    def __init__(self, request: GraphRunnerRequest) -> None:
        super().__init__(request)
        self._stream = torch.cuda.Stream(request.runtime.device)  # type: ignore[no-untyped-call]

    def create_graph(self, key: ShapeKey) -> torch.cuda.CUDAGraph:
        """An empty graph."""
        return torch.cuda.CUDAGraph()

    def capture_graph(
        self, graph: torch.cuda.CUDAGraph, run: Callable[[], LogitsOutput]
    ) -> LogitsOutput:
        """Record on the side stream; other threads may go on using the device meanwhile."""
        capture = torch.cuda.graph(
            graph, pool=self.pool, stream=self._stream, capture_error_mode="thread_local"
        )
        with recording(capture, self._end_allocation):
            output = run()
        return borrow(output, "__cuda_array_interface__")

    def replay_graph(self, graph: torch.cuda.CUDAGraph) -> None:
        """Launch on the current stream."""
        graph.replay()

    def pool_handle(self) -> Any:
        """The pool of every graph of the device."""
        return torch.cuda.graph_pool_handle()

    def _end_allocation(self) -> None:
        """Tell torch's allocator that nothing is recorded into the pool any more."""
        pool: Any = self.pool
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)

    @contextmanager
    def capture_stream(self) -> Iterator[None]:
        """The side stream, ordered after and before the current one: warm-ups run there too."""
        home = torch.cuda.current_stream(self.request.runtime.device)
        self._stream.wait_stream(home)
        with torch.cuda.stream(self._stream):
            yield
        home.wait_stream(self._stream)
