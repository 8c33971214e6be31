# SPDX-License-Identifier: Apache-2.0
"""Recorded decode: the device primitives below the core's GraphRunner."""

from __future__ import annotations

__all__ = ["CudaGraphRunner"]

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from bedplate.graph.runner import GraphRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

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
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            output = run()
        return _borrow(output)

    def replay_graph(self, graph: torch.cuda.CUDAGraph) -> None:
        """Launch on the current stream."""
        graph.replay()

    def pool_handle(self) -> Any:
        """The pool of every graph of the device."""
        return torch.cuda.graph_pool_handle()

    @contextmanager
    def capture_stream(self) -> Iterator[None]:
        """The side stream, ordered after and before the current one: warm-ups run there too."""
        home = torch.cuda.current_stream(self.request.runtime.device)
        self._stream.wait_stream(home)
        with torch.cuda.stream(self._stream):
            yield
        home.wait_stream(self._stream)


@dataclass(frozen=True, slots=True)
class _Memory:
    """Device memory that somebody else owns, as torch takes it over."""

    __cuda_array_interface__: dict[str, Any]


def _borrow(output: LogitsOutput) -> LogitsOutput:
    """The same results without owning their memory.

    The pool then gives it to the next graph too: results are valid until the next replay
    anyway, and logits of every bucket would take gigabytes.  The graphs keep the pool.
    """
    hidden, tokens = output.hidden_states, output.tokens
    return replace(
        output,
        next_token_logits=_alias(output.next_token_logits),
        hidden_states=None if hidden is None else _alias(hidden),
        tokens=None if tokens is None else _alias(tokens),
    )


def _alias(tensor: Tensor) -> Tensor:
    """A view of the tensor's memory that does not keep it."""
    size = tensor.element_size()
    memory = _Memory(
        {
            "shape": tuple(tensor.shape),
            "strides": tuple(step * size for step in tensor.stride()),
            "typestr": "|i1" if size == 1 else f"<i{size}",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }
    )
    return torch.as_tensor(memory, device=tensor.device).view(tensor.dtype)
