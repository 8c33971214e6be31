# SPDX-License-Identifier: Apache-2.0
"""A compiled forward per bucket, behind the interface of recorded graphs.

The host has no graphs; ``torch.compile`` with fixed sizes takes their place.  Off unless
asked for, because compiling takes seconds to minutes per bucket (``runtime.capabilities``).
"""

from __future__ import annotations

__all__ = ["CompiledRunner"]

import itertools
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
import torch._dynamo.config
from torch import Tensor

from bedplate.errors import CaptureError
from bedplate.graph.runner import GraphRunner

if TYPE_CHECKING:
    from collections.abc import Callable

    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.batch.logits import LogitsOutput
    from bedplate.contract.attention import AttentionBackend, AttentionCallSpec
    from bedplate.contract.graph import GraphRunnerRequest
    from bedplate.graph.keys import ShapeKey

_SPARE_VARIANTS = 64
"""Compiled variants of one function beyond one per graph before torch gives it up."""


class CompiledGraph:
    """Holds one bucket's compiled forward, once captured."""

    function: Callable[[], LogitsOutput]


class CompiledRunner(GraphRunner):
    """One compiled forward per bucket and hidden mode.

    The attention of the request is made opaque to the compiler while graphs exist.
    """

    def __init__(self, request: GraphRunnerRequest) -> None:
        super().__init__(request)
        self._attention_seam = OpaqueAttention(request.attention)
        graphs = len(request.capture_sizes) * len(request.hidden_modes)
        self._variants = graphs + _SPARE_VARIANTS

    def create_graph(self, key: ShapeKey) -> CompiledGraph:
        """An empty holder; the warm-ups that follow show the seam every attention call."""
        self._attention_seam.install()
        return CompiledGraph()

    def capture_graph(
        self, graph: CompiledGraph, run: Callable[[], LogitsOutput]
    ) -> LogitsOutput:
        """Compile and run once.

        Raises:
            Exception: Whatever the compiler says, such as a missing host compiler.
        """
        graph.function = torch.compile(run, dynamic=False)
        # All buckets are variants of one function: the usual limit of 8 would drop the rest.
        with torch._dynamo.config.patch(
            recompile_limit=self._variants,
            accumulated_recompile_limit=self._variants * 64,
            fail_on_recompile_limit_hit=True,
        ):
            return graph.function()

    def replay_graph(self, graph: CompiledGraph) -> LogitsOutput:
        """Run the compiled forward; its results are new tensors each time."""
        return graph.function()

    def update_host_parameters(self, graph: CompiledGraph, batch: ForwardBatch) -> None:
        """Do what attention records in a graph elsewhere, and show it the batch."""
        self._attention_seam.prepare_in_graph(batch)

    def release(self) -> None:
        """Drop the compiled functions and give attention back as it was."""
        self._attention_seam.remove()
        super().release()


_seams: WeakValueDictionary[int, OpaqueAttention] = WeakValueDictionary()
_numbers = itertools.count()


class OpaqueAttention:
    """Keeps attention out of compiled code, as one operation that the compiler cannot see.

    Host attention works by the lengths of the batch; compiled code would bake them in, and
    be compiled again at each step.

    Args:
        attention: Whose ``forward`` and ``prepare_in_graph`` are replaced while installed.
    """

    def __init__(self, attention: AttentionBackend) -> None:
        self.attention = attention
        self.calls: dict[int, AttentionCallSpec] = {}
        self.batch: ForwardBatch | None = None
        self.eager = attention.forward
        self._eager_prepare = attention.prepare_in_graph
        self._number = next(_numbers)
        _seams[self._number] = self

    def install(self) -> None:
        """Put this object between the model and attention; again is harmless."""
        vars(self.attention).update(
            forward=self.forward, prepare_in_graph=self.prepare_in_graph
        )

    def remove(self) -> None:
        """Take it out; again is harmless."""
        for name in ("forward", "prepare_in_graph"):
            vars(self.attention).pop(name, None)
        self.batch = None

    def prepare_in_graph(self, batch: ForwardBatch) -> None:
        """Prepare eagerly; compiled code finds it done."""
        if not torch.compiler.is_compiling():
            self.batch = batch
            self._eager_prepare(batch)

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        call: AttentionCallSpec,
        batch: ForwardBatch,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """``AttentionBackend.forward``, as an opaque operation where code is compiled."""
        if torch.compiler.is_compiling():
            shape = (call.num_heads, call.value_dim)
            out: Tensor = _attention(q, k, v, sinks, self._number, call.call_id, *shape)
            return out
        self.calls[call.call_id] = call
        return self.eager(q, k, v, call, batch, sinks=sinks)


@torch.library.custom_op("bedplate_cpu::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    sinks: Tensor | None,
    seam: int,
    call: int,
    num_heads: int,
    value_dim: int,
) -> Tensor:
    """``[T, H, Dv]``; writes the cache, which no compiled code touches otherwise."""
    owner = _seams[seam]
    if owner.batch is None or call not in owner.calls:
        raise CaptureError(f"attention call {call} was not seen in the warm-ups")
    batch = owner.batch
    return owner.eager(q, k, v, owner.calls[call], batch, sinks=sinks).contiguous()


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    sinks: Tensor | None,
    seam: int,
    call: int,
    num_heads: int,
    value_dim: int,
) -> Tensor:
    return q.new_empty((q.shape[0], num_heads, value_dim))
