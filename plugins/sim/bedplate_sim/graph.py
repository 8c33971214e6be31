# SPDX-License-Identifier: Apache-2.0
"""Recorded passes: a graph is the tape of the work that a capture would have queued."""

from __future__ import annotations

__all__ = ["SimGraphRunner", "Tape"]

from contextlib import contextmanager
from typing import TYPE_CHECKING

from bedplate.errors import ReplayError
from bedplate.graph.runner import GraphRunner
from bedplate_sim.allocator import poison

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bedplate.batch.logits import LogitsOutput
    from bedplate.contract import GraphRunnerRequest
    from bedplate.graph.keys import ShapeKey
    from bedplate_sim.allocator import Block, Pool
    from bedplate_sim.device import Device, Task
    from bedplate_sim.runtime import SimRuntime


class Tape:
    """One graph: work at the addresses of its capture.

    It holds no tensors, as a graph of a device does not: memory that was given back since is
    noticed, and refused.

    Args:
        device: Where it runs.
        pool: Memory of everything that the recorded work allocates; shared with other graphs,
            whose results a replay destroys.
    """

    def __init__(self, device: Device, pool: Pool) -> None:
        self._device = device
        self.pool = pool
        self.tasks: list[Task] = []
        self._inputs: dict[Block, tuple[int, str]] = {}
        pool.graphs.add(self)

    def record(self, task: Task) -> None:
        """Keep the work, and which life of which memory it uses."""
        self.tasks.append(task)
        for block in (*task.reads, *task.writes):
            if block not in self.pool.blocks:
                self._inputs.setdefault(block, (block.life, task.name))

    def replay(self) -> None:
        """Queue the whole tape as one piece of work.

        Raises:
            ReplayError: Memory that it uses was given back since the capture.
        """
        for block, (life, name) in self._inputs.items():
            if block.life != life:
                raise ReplayError(
                    f"the graph's {name} uses memory at {block.address:#x}, which was given "
                    "back after the capture: a weight or a buffer has moved. Update tensors in "
                    "place, or capture again"
                )
        own = tuple(self.pool.blocks)
        written = {block for task in self.tasks for block in task.writes}
        read = {block for task in self.tasks for block in task.reads} - written
        self._device.launch("replay", self._play, [*read], [*written.union(own)])

    def _play(self) -> None:
        for block in self.pool.blocks:
            poison(block.bytes)  # nothing outlives the next replay
        for task in self.tasks:
            task.run()


class SimGraphRunner(GraphRunner):
    """One tape per bucket and hidden mode, all from one pool, captured on a side stream."""

    def __init__(self, request: GraphRunnerRequest) -> None:
        super().__init__(request)
        runtime: SimRuntime = request.runtime  # type: ignore[assignment]
        self._device = runtime.simulated
        self._stream = self._device.new_stream()

    def create_graph(self, key: ShapeKey) -> Tape:
        """An empty tape."""
        pool: Pool = self.pool  # type: ignore[assignment]
        return Tape(self._device, pool)

    def capture_graph(self, graph: Tape, run: Callable[[], LogitsOutput]) -> LogitsOutput:
        """Record.

        Raises:
            RuntimeError: The device was told to fail.
        """
        if self._device.strikes("capture"):
            raise RuntimeError("the simulated device was told to fail at this capture")
        with self._device.capture(graph):
            return run()

    def replay_graph(self, graph: Tape) -> None:
        """Queue the tape.

        Raises:
            RuntimeError: The device was told to fail.
        """
        if self._device.strikes("replay"):
            raise RuntimeError("the simulated device was told to fail at this replay")
        graph.replay()

    def pool_handle(self) -> Pool:
        """The memory of every graph of the device."""
        return self._device.allocator.new_pool()

    @contextmanager
    def capture_stream(self) -> Iterator[None]:
        """The side stream, ordered after and before the current one."""
        device, home = self._device, self._device.current
        self._stream.wait(device.record_event())
        with device.stream(self._stream):
            yield
            done = device.record_event()
        home.wait(done)
