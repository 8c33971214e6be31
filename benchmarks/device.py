# SPDX-License-Identifier: Apache-2.0
"""Times on an accelerator, and its ceilings: what every figure is held against."""

from __future__ import annotations

import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bedplate import Engine
    from bedplate_triton.features import Features


_SIMULATED_RUNTIME = "ASCEND_SIMULATED_RUNTIME"
"""Variable that a simulated runtime of the NPU backend sets to its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the device reached in this run.

    Attributes:
        device: Its name.
        copy_tbs: A large copy, bytes read plus bytes written, TB/s.
        read_tbs: A large read, TB/s.
        tflops: A bfloat16 product of 8192 × 8192 × 8192 on random numbers.
    """

    device: str
    copy_tbs: float
    read_tbs: float
    tflops: float

    def floor_us(self, nbytes: int, flops: int) -> float:
        """Least time for so many bytes and operations, with these ceilings."""
        memory = max(self.copy_tbs, self.read_tbs) * 1e6
        return max(nbytes / memory, flops / (self.tflops * 1e6))

    def as_json(self) -> dict[str, object]:
        """For result files."""
        return asdict(self)


def device_features() -> Features:
    """What kernels may know of this device, from its backend."""
    if torch.version.hip is None:
        from bedplate_cuda.ops import device_features as found
    else:
        from bedplate_rocm.ops import device_features as found
    return found()


def with_chain(features: Features) -> Features:
    """The same device with chained launches, if it has them."""
    if not features.arch.startswith("sm_"):
        return features
    from bedplate_cuda import ops

    return ops.with_chain(features)


def refuse_simulated(engine: Engine) -> None:
    """End the program if the engine's device says that it is simulated."""
    if "simulated" in engine.runner.bound.capabilities.facts:
        sys.exit(
            f"Backend {engine.runner.bound.name!r} simulates its device, so its times mean "
            "nothing and none are reported. Name the backend of a real one with --backend"
        )


def refuse_simulated_runtime() -> None:
    """End the program before it begins, if this process has a simulated runtime."""
    named = os.environ.get(_SIMULATED_RUNTIME)
    if named:
        sys.exit(
            f"{_SIMULATED_RUNTIME}={named} is set: a simulated runtime lies below the devices "
            "of this process, so times mean nothing and none are reported. Unset it, and run "
            "on a device"
        )


def time_us(function: Callable[[], object], repeats: int = 20) -> float:
    """Median time of one call on the current stream, by events."""
    for _ in range(3):
        function()
    marks = [torch.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    marks[-1].synchronize()
    times = [a.elapsed_time(b) for a, b in pairwise(marks)]
    return statistics.median(times) * 1e3


def recorded_us(functions: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median time of one of these calls inside a graph that makes them all, in turn.

    Gaps between launches are those of a recorded step; with enough different inputs, caches
    are as cold as there.
    """
    for function in functions:
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    return time_us(graph.replay, repeats) / len(functions)


def measure_ceilings() -> Ceilings:
    """Copy, read and multiply as fast as torch does.

    In a process of its own: libraries would keep parts of its large blocks for ever, and the
    memory of an engine could no longer be told from them.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure_here).result()


def _measure_here() -> Ceilings:
    copy, read = _memory_tbs()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    tflops = 2 * 8192**3 / time_us(lambda: a @ b) / 1e6
    return Ceilings(
        device=torch.cuda.get_device_name(), copy_tbs=copy, read_tbs=read, tflops=tflops
    )


def _memory_tbs() -> tuple[float, float]:
    """TB/s of a copy, read and written bytes together, and of a pure read."""
    words = torch.empty(1 << 30, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(words)
    numbers = words.view(-1, 1 << 18)
    copy = 2 * words.nbytes / time_us(lambda: target.copy_(words))
    read = words.nbytes / time_us(lambda: torch.amax(numbers, dim=1))
    return copy / 1e6, read / 1e6
