# SPDX-License-Identifier: Apache-2.0
"""Host time of ``GraphRunner.can_run`` and ``replay`` when the device does nothing.

    python -m benchmarks.cases.graph

The copies into the static slots run on the host here; their time alone is in the last column.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from bedplate.batch.forward_mode import CaptureHiddenMode
from bedplate.batch.logits import LogitsOutput
from bedplate.contract.graph import GraphRunnerRequest
from bedplate.graph.buckets import capture_sizes
from bedplate.graph.runner import GraphRunner
from bedplate.testing.graphs import CountingRuntime
from bedplate.testing.tiny_decoder import TinyAttention, decode_batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.graph.keys import ShapeKey

SIZES = (1, 7, 256, 250)


class NothingRunner(GraphRunner):
    """Graphs that do nothing."""

    def create_graph(self, key: ShapeKey) -> None:
        return None

    def capture_graph(self, graph: None, run: Callable[[], LogitsOutput]) -> LogitsOutput:
        return run()

    def replay_graph(self, graph: None) -> None:
        return None


class NothingAttention(TinyAttention):
    """Metadata that costs nothing."""

    def prepare(self, batch: ForwardBatch) -> None:
        return None


@dataclass(frozen=True)
class Line:
    """Median microseconds at one batch size."""

    batch_size: int
    can_run_us: float
    replay_us: float
    copies_us: float


def measure(sizes: tuple[int, ...] = SIZES, repeats: int = 3000) -> list[Line]:
    """One line per batch size, graphs captured for all sizes up to 256."""
    attention = NothingAttention(rows=300, width=4)
    runner = NothingRunner(
        GraphRunnerRequest(
            runtime=CountingRuntime(),
            forward=lambda b: LogitsOutput(next_token_logits=torch.zeros(b.batch_size, 8)),
            attention=attention,
            capture_sizes=capture_sizes(256, limit=256),
            hidden_modes=(CaptureHiddenMode.NULL,),
            index_dtype="int64",
            record=lambda decision: None,
        )
    )
    runner.capture()
    return [_line(runner, decode_batch([3] * size, attention), repeats) for size in sizes]


def _line(runner: GraphRunner, batch: ForwardBatch, repeats: int) -> Line:
    route = runner.replay_prepare(batch)
    slots = runner._static_slots()
    bucket = route.captured.key.batch_size
    return Line(
        batch_size=batch.batch_size,
        can_run_us=_time(lambda: runner.can_run(batch), repeats),
        replay_us=_time(lambda: runner.replay(batch), repeats),
        copies_us=_time(lambda: slots.load(batch, batch.batch_size, bucket), repeats),
    )


def _time(function: Callable[[], Any], repeats: int) -> float:
    for _ in range(100):
        function()
    gc.disable()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        function()
        samples.append(time.perf_counter_ns() - start)
    gc.enable()
    return median(samples) / 1e3


def main() -> None:
    print(f"{'batch':>6} {'can_run µs':>11} {'replay µs':>10} {'of that copies µs':>18}")
    for line in measure():
        print(
            f"{line.batch_size:6d} {line.can_run_us:11.2f} {line.replay_us:10.2f} "
            f"{line.copies_us:18.2f}"
        )


if __name__ == "__main__":
    main()
