# SPDX-License-Identifier: Apache-2.0
"""L7: ratios and counts, never absolute times.

A ratio compares two things on the same machine in the same minute, so it means the same on a
busy one; the budgets are generous, and ``--baseline`` holds them against an earlier run.
"""

from __future__ import annotations

__all__ = ["BUDGETS", "checks"]

from collections import Counter
from functools import partial
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bedplate.conformance.cases.operations import CASES
from bedplate.conformance.check import Check, require
from bedplate.conformance.graph_bench import GraphBench
from bedplate.conformance.levels.operations import declared
from bedplate.conformance.oracle import Oracle, greedy
from bedplate.contract.decisions import Support
from bedplate.contract.memory import AllocatorRequest
from bedplate.memory.allocator import PagedAllocator
from bedplate.memory.factory import make_allocator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bedplate.conformance.cases.operations import OpCase
    from bedplate.conformance.subject import Subject
    from bedplate.contract.ops import OpProvider
    from bedplate.engine.engine import Engine

BUDGETS = {
    "replay_over_eager": 2.0,
    "allocator_over_core": 25.0,
    "operation_over_meaning": 25.0,
    "waits_per_step": 1.0,
    "events_per_step": 2.0,
    "hook_calls": 0.0,
}
"""Number → largest acceptable value."""
_GROWTH = 1.5
_SLACK = 0.25
"""A number may grow by this factor, or by this much, beyond a baseline."""


def checks(subject: Subject) -> Iterator[Check]:
    """Counts of a running engine, then ratios."""
    graph = subject.capabilities.graph
    recorded = Support.yes() if graph.default else Support.no("graph.default is off")
    yield Check(level=7, name="step/counts", run=_step_counts)
    yield Check(level=7, name="allocator", run=_allocator)
    yield Check(level=7, name="replay", run=_replay, declared=recorded, attempt=False)
    for case in CASES:
        if not case.nbytes or case.dtype != "float32":
            continue
        for provider in subject.bound.ops.providers(case.op):
            if provider.kind != "reference" and declared(subject, provider, case):
                run = partial(_operation, case, provider)
                name = f"operation/{case.op}/{provider.provider.replace(', ', '.')}/{case.name}"
                yield Check(level=7, name=name, run=run)


def within(subject: Subject, name: str, value: float) -> dict[str, float]:
    """The number for the report.

    Raises:
        Wrong: It is beyond its budget, or has grown since the baseline.
    """
    budget = subject.tolerance(BUDGETS[name])
    require(value <= budget, f"{name} is {value:.2f}, allowed {budget:g}")
    before = subject.before(name)
    if before is not None:
        most = max(before * _GROWTH, before + _SLACK)
        require(value <= most, f"{name} is {value:.2f}, and was {before:.2f} in the baseline")
    return {name: round(value, 3)}


def _seconds(act: Callable[[], Any], runs: int = 9, repeats: int = 5) -> float:
    """Median of several runs, each of a few calls."""
    act()
    times = []
    for _ in range(runs):
        begin = perf_counter()
        for _ in range(repeats):
            act()
        times.append((perf_counter() - begin) / repeats)
    return median(times)


class _Counting:
    """Counts calls of a runtime's methods while it is inside of ``with``."""

    def __init__(self, runtime: Any, names: Sequence[str]) -> None:
        self._runtime, self._names = runtime, names
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> Counter[str]:
        for name in self._names:
            vars(self._runtime)[name] = self._counted(name, getattr(self._runtime, name))
        return self.calls

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            vars(self._runtime).pop(name, None)

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            return method(*arguments)

        return call


def _step_counts(subject: Subject) -> dict[str, float]:
    """In steady decoding nobody asks a hook, waits for the device, or allocates by surprise."""
    oracle = subject.keep("oracle qwen3 float32", lambda: Oracle("qwen3", "float32"))
    with oracle.engine(subject) as engine:
        steps = 12
        for prompt in oracle.prompts((9, 17, 5)):
            engine.add_request(
                prompt, greedy(max_tokens=40, prompt_logprobs=None, logprobs=None)
            )
        for _ in range(6):
            engine.step()
        runtime = engine.runner.bound.runtime
        with _Counting(runtime, ("synchronize", "record_event")) as calls:
            hooks = _hook_calls(engine, steps=steps)
        engine.core.abort_all()
    return (
        within(subject, "hook_calls", hooks)
        | within(subject, "waits_per_step", calls["synchronize"] / steps)
        | within(subject, "events_per_step", calls["record_event"] / steps)
    )


def _hook_calls(engine: Engine, steps: int) -> int:
    """Hooks called through pluggy, by anybody in the process, during some steps."""
    import pluggy

    count = 0
    inner = pluggy.HookCaller.__call__

    def counted(caller: Any, **arguments: Any) -> Any:
        nonlocal count
        count += 1
        return inner(caller, **arguments)

    pluggy.HookCaller.__call__ = counted  # type: ignore[assignment, method-assign]
    try:
        for _ in range(steps):
            engine.step()
    finally:
        pluggy.HookCaller.__call__ = inner  # type: ignore[method-assign]
    return count


def _allocator(subject: Subject) -> dict[str, float]:
    """A decode step's slots, against the core's allocator."""
    size, rows = subject.page_size, 64
    request = AllocatorRequest(num_tokens=rows * size * 4, page_size=size)
    theirs = subject.bound.make_allocator(request) or make_allocator(request)
    ours = PagedAllocator(request.num_tokens, size)

    def step(allocator: Any) -> Callable[[], None]:
        first = np.ones(rows, np.int32)
        nothing = np.full(rows, -1, np.int32)

        def act() -> None:
            slots = allocator.alloc_decode(first, nothing)
            allocator.free(slots)

        return act

    ratio = _seconds(step(theirs)) / _seconds(step(ours))
    return within(subject, "allocator_over_core", ratio)


def _replay(subject: Subject) -> dict[str, float]:
    """Host and device time of a replay, against the same pass run eagerly."""
    bench = subject.keep("graphs", lambda: GraphBench(subject.bound).captured())
    batch = bench.batch([5, 3, 7, 4])

    def timed(act: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            act()
            bench.runtime.synchronize()

        return run

    eager = _seconds(timed(lambda: bench.eager(batch)))
    replay = _seconds(timed(lambda: bench.replay(batch)))
    return within(subject, "replay_over_eager", replay / eager)


def _operation(case: OpCase, provider: OpProvider, subject: Subject) -> dict[str, float]:
    """An implementation, against the plain meaning on the same device."""
    arguments = {
        name: value.to(subject.device) if isinstance(value, torch.Tensor) else value
        for name, value in case.arguments(subject.page_size).items()
    }

    def timed(call: Callable[..., object]) -> Callable[[], None]:
        def run() -> None:
            call(**arguments)
            subject.bound.runtime.synchronize()

        return run

    with subject.bound.runtime.inference_guard():
        ratio = _seconds(timed(provider.call)) / _seconds(timed(case.meaning))
    return within(subject, "operation_over_meaning", ratio)
