# SPDX-License-Identifier: Apache-2.0
"""Host cost of a decode step: the engine with nothing behind it.

A null executor answers at once, every request decodes at a context of 1024, nothing is
detokenized, and the step's tokens are read as arrays (token-id streaming).  Process time, so
that neighbours on the machine count little; the median step of many, and where it goes.

    python -m benchmarks.cases.host_cost [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import TYPE_CHECKING, Any

from bedplate.engine.core import EngineCore
from bedplate.memory.allocator import PagedAllocator
from bedplate.memory.req_to_token import ReqToTokenPool
from bedplate.runner.sampling_params import SamplingParams
from bedplate.scheduling.scheduler import Scheduler
from bedplate.testing.null_executor import NullExecutor

if TYPE_CHECKING:
    from collections.abc import Callable

CONTEXT_TOKENS = 1024
STEPS = 2000
BARS_US = {1: 30.0, 32: None, 256: 250.0}
EOS = (2, 3)


def make(batch: int, *, page_size: int, overlap: bool) -> tuple[EngineCore, Scheduler]:
    """An engine in which ``batch`` requests have ``CONTEXT_TOKENS`` tokens and decode."""
    longest = CONTEXT_TOKENS + STEPS + 200
    pages = -(-longest // page_size)
    scheduler = Scheduler(
        allocator=PagedAllocator(batch * pages * page_size, page_size),
        req_to_token_pool=ReqToTokenPool(batch, longest),
        page_size=page_size,
        max_context_len=longest,
        max_running_requests=batch,
        max_prefill_tokens=8192,
        overlap=overlap,
    )
    executor = NullExecutor(batch, asynchronous=overlap)
    core = EngineCore(
        scheduler=scheduler, executor=executor, eos_token_ids=EOS, observers=[lambda _: None]
    )
    for number in range(batch):
        # Not all at the same place of a page, which would be a special case.
        prompt = [number + 10] * (CONTEXT_TOKENS + number * 7 % 16)
        core.add_request(prompt, SamplingParams(seed=number))
    while scheduler.roster.decode.size < batch:
        core.step()
    return core, scheduler


def timed(step: Callable[[], Any], count: int) -> float:
    """Median microseconds of process time of one call."""
    times = []
    for _ in range(count):
        begun = time.process_time_ns()
        step()
        times.append(time.process_time_ns() - begun)
    return statistics.median(times) / 1000


class Meter:
    """Sums the process time of one method, which it replaces."""

    def __init__(self, owner: Any, name: str) -> None:
        self.total_ns = 0
        inner = getattr(owner, name)

        def measured(*args: Any) -> Any:
            begun = time.process_time_ns()
            try:
                return inner(*args)
            finally:
                self.total_ns += time.process_time_ns() - begun

        setattr(owner, name, measured)

    def mean_us(self, steps: int) -> float:
        return self.total_ns / steps / 1000


def measure(batch: int, *, page_size: int, overlap: bool) -> dict[str, Any]:
    """One row: the whole step without meters, then its parts with them."""
    core, scheduler = make(batch, page_size=page_size, overlap=overlap)
    timed(core.step, 50)
    whole = timed(core.step, STEPS // 2)
    slots = Meter(scheduler.slots, "decode")
    plan, apply = Meter(scheduler, "next_batch"), Meter(scheduler, "apply")
    stats = Meter(core, "_observe")
    count = STEPS // 2
    timed(core.step, count)
    return {
        "batch": batch,
        "page_size": page_size,
        "overlap": overlap,
        "step_us": whole,
        "slots_us": slots.mean_us(count),
        "plan_us": plan.mean_us(count) - slots.mean_us(count),
        "apply_us": apply.mean_us(count),
        "stats_us": stats.mean_us(count),
        "bar_us": BARS_US[batch],
    }


def main() -> int:
    """Print the table; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    as_json = parser.parse_args().json
    rows = [
        measure(batch, page_size=page, overlap=overlap)
        for page, overlap in ((1, False), (16, False), (16, True))
        for batch in BARS_US
    ]
    if as_json:
        print("\n".join(json.dumps(row) for row in rows))
    else:
        report(rows)
    return int(any(row["bar_us"] and row["step_us"] > row["bar_us"] for row in rows))


def report(rows: list[dict[str, Any]]) -> None:
    print(f"µs of process time per decode step, median of {STEPS // 2}, context 1024")
    print("page overlap batch |   step |  slots   plan  apply  stats | bar")
    for row in rows:
        parts = "".join(
            f"{row[k]:7.1f}" for k in ("slots_us", "plan_us", "apply_us", "stats_us")
        )
        bar = "" if row["bar_us"] is None else f"{row['bar_us']:.0f}"
        print(
            f"{row['page_size']:4} {row['overlap']!s:7} {row['batch']:5} |"
            f"{row['step_us']:7.1f} |{parts} | {bar}"
        )
    print("parts are means, with meters of about 0.7 µs around them; plan without slots")


if __name__ == "__main__":
    raise SystemExit(main())
