# SPDX-License-Identifier: Apache-2.0
"""Graphs without a device: a runner whose graphs are tapes of torch operations.

A tape behaves as a recorded graph must: it replays operations on the tensors, the sizes and
the Python numbers of the capture, writes results where the capture put them, refuses to read
the host while recording, and shares one pool of memory with the other tapes, so that a replay
overwrites the outputs of an earlier one.  A runner that forgets to refresh a slot, or a kernel
that depends on a host integer outside the key, gives wrong numbers here as on a device.

``RerunGraphRunner`` is for what a tape cannot record.
``TapeGraphRunner.events`` says what was called, in order; ``CountingRuntime`` counts waits.
"""

from __future__ import annotations

__all__ = ["CountingRuntime", "RerunGraphRunner", "Tape", "TapeGraphRunner"]

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bedplate.batch.logits import LogitsOutput
from bedplate.contract.runtime import MemoryStatus
from bedplate.errors import CaptureError, ReplayError
from bedplate.graph.runner import GraphRunner
from bedplate.reference.runtime import TorchRuntime

if TYPE_CHECKING:
    from collections.abc import Callable

    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.contract.graph import GraphRunnerRequest
    from bedplate.graph.keys import ShapeKey

_READS_HOST = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "is_nonzero"}


class CountingRuntime(TorchRuntime):
    """The host as a device that counts waits and invents its memory figures.

    Attributes:
        calls: Method name → calls.
        free_bytes: What ``memory`` reports next.
    """

    def __init__(self) -> None:
        super().__init__("cpu")
        self.calls: Counter[str] = Counter()
        self.free_bytes = 1 << 30

    def synchronize(self) -> None:
        """Only counted."""
        self.calls["synchronize"] += 1

    def empty_cache(self) -> None:
        """Only counted."""
        self.calls["empty_cache"] += 1

    def memory(self) -> MemoryStatus:
        """The invented figure."""
        return MemoryStatus(free_bytes=self.free_bytes, total_bytes=1 << 30)


@dataclass(frozen=True, slots=True)
class _Operation:
    """One recorded call; ``inputs`` and ``addresses`` belong together."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    inputs: list[Tensor]
    addresses: list[int]

    def play(self) -> None:
        if [tensor.data_ptr() for tensor in self.inputs] != self.addresses:
            raise ReplayError(f"an input of {self.func} has moved since the capture")
        fresh = self.func(*self.args, **self.kwargs)
        for old, new in zip(_tensors(self.result), _tensors(fresh), strict=True):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """One recorded graph.

    Attributes:
        key: What was recorded.
        operations: What runs at each replay, in order.
    """

    def __init__(self, key: ShapeKey) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.key = key
        self.operations: list[_Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run and record one operation.

        Raises:
            CaptureError: The operation reads values on the host.
        """
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in _READS_HOST:
            raise CaptureError(f"{func} waits for the device while a graph is captured")
        result = func(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        addresses = [tensor.data_ptr() for tensor in inputs]
        self.operations.append(_Operation(func, args, kwargs, result, inputs, addresses))
        return result

    def play(self) -> None:
        """Repeat all operations at the recorded addresses.

        Raises:
            ReplayError: A tensor has moved: a slot, or a weight that was replaced.
        """
        for operation in self.operations:
            operation.play()


class TapeGraphRunner(GraphRunner):
    """Records tapes; see the module's description.

    Attributes:
        events: (call, bucket) in order: create, capture, update, replay.
        fail_sizes: Buckets whose capture fails, for fault injection.
        lengths: Host lengths that the last ``update_host_parameters`` saw.
    """

    def __init__(self, request: GraphRunnerRequest) -> None:
        super().__init__(request)
        self.events: list[tuple[str, int]] = []
        self.fail_sizes: set[int] = set()
        self.lengths: list[int] = []

    def pool_handle(self) -> list[Tensor]:
        """The pool: a block for logits and one for hidden states, once they exist."""
        return []

    def create_graph(self, key: ShapeKey) -> Tape:
        """An empty tape."""
        self.events.append(("create", key.batch_size))
        return Tape(key)

    def capture_graph(self, graph: Tape, run: Callable[[], LogitsOutput]) -> LogitsOutput:
        """Record, then have the results copied into the pool shared by all tapes.

        Raises:
            RuntimeError: The bucket is among ``fail_sizes``.
        """
        self.events.append(("capture", graph.key.batch_size))
        with graph:
            output = run()
        if graph.key.batch_size in self.fail_sizes:
            raise RuntimeError("injected capture failure")
        logits = self._share(graph, output.next_token_logits, 0)
        hidden = output.hidden_states
        if hidden is not None:
            hidden = self._share(graph, hidden, 1)
        return LogitsOutput(
            next_token_logits=logits, hidden_states=hidden, tokens=output.tokens
        )

    def replay_graph(self, graph: Tape) -> None:
        """Play the tape."""
        self.events.append(("replay", graph.key.batch_size))
        graph.play()

    def update_host_parameters(self, graph: Tape, batch: ForwardBatch) -> None:
        """Note the lengths."""
        self.events.append(("update", graph.key.batch_size))
        self.lengths = batch.seq_lens_cpu.tolist()

    def _share(self, graph: Tape, value: Tensor, block: int) -> Tensor:
        """The start of a block of the pool, into which the tape now copies ``value``."""
        blocks: list[Tensor] = self.pool  # type: ignore[assignment]
        while block >= len(blocks):
            blocks.append(torch.empty(0, dtype=value.dtype))
        if blocks[block].numel() < value.numel():  # older tapes keep theirs
            blocks[block] = torch.empty(value.numel(), dtype=value.dtype)
        place = blocks[block][: value.numel()].view(value.shape)
        with graph:
            place.copy_(value)
        return place


class RerunGraphRunner(GraphRunner):
    """Graphs that run their part again, for models with operations that a tape cannot hold.

    What is baked into a graph does not show here; what a loop keeps in the slots does.
    """

    def create_graph(self, key: ShapeKey) -> list[Callable[[], LogitsOutput]]:
        """An empty place for the part."""
        return []

    def capture_graph(
        self, graph: list[Callable[[], LogitsOutput]], run: Callable[[], LogitsOutput]
    ) -> LogitsOutput:
        """Keep the part, and run it once."""
        graph.append(run)
        return run()

    def replay_graph(self, graph: list[Callable[[], LogitsOutput]]) -> LogitsOutput:
        """Run it again."""
        return graph[0]()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
