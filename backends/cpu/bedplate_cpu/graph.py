# SPDX-License-Identifier: Apache-2.0
"""A compiled forward per bucket, behind the interface of recorded graphs.

The host has no graphs; what takes their place is ``torch.compile`` with fixed sizes.  Off
unless asked for: compiling takes seconds to minutes per bucket (see ``capabilities``).

Attention stays outside the compiled code, as one opaque operation: its work depends on the
lengths of the batch, for which compiled code would be made again and again.
"""

from __future__ import annotations

__all__ = ["CompiledRunner"]

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from bedplate.graph.runner import GraphRunner

if TYPE_CHECKING:
    from collections.abc import Callable

    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.batch.logits import LogitsOutput
    from bedplate.contract.attention import AttentionBackend, AttentionCallSpec
    from bedplate.contract.graph import GraphRunnerRequest
    from bedplate.graph.keys import ShapeKey

_SPARE_COMPILES = 64
"""Compiled variants of one function beyond one per graph, before torch gives up on it."""


@dataclass(slots=True)
class CompiledGraph:
    """One bucket's compiled forward; empty until captured."""

    function: Callable[[], LogitsOutput] | None = None


class CompiledRunner(GraphRunner):
    """One compiled forward per bucket and hidden mode."""

    def __init__(self, request: GraphRunnerRequest) -> None:
        super().__init__(request)
        self._opaque = OpaqueAttention(request.attention)

    def create_graph(self, key: ShapeKey) -> CompiledGraph:
        """An empty holder."""
        return CompiledGraph()

    def capture_graph(
        self, graph: CompiledGraph, run: Callable[[], LogitsOutput]
    ) -> LogitsOutput:
        """Compile and run once."""
        graph.function = torch.compile(run, dynamic=False)
        return self._call(graph)

    def replay_graph(self, graph: CompiledGraph) -> LogitsOutput:
        """Run the compiled forward; its results are new tensors each time."""
        return self._call(graph)

    def update_host_parameters(self, graph: CompiledGraph, batch: ForwardBatch) -> None:
        """Tell attention which batch it serves."""
        self._opaque.batch = batch
