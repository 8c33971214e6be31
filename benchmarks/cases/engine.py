# SPDX-License-Identifier: Apache-2.0
"""The whole engine on a device: decode steps, prompts, a mixed load, memory.

    python -m benchmarks.cases.engine qwen3-8b --backend NAME [--tests decode,prompts,mixed]

Made-up weights in a real shape, greedy, no prefix hits.  A decode step's time is that of 128
steady steps divided by 128, counted while tokens arrive, the first sixteen left out; a
prompt's time is that of a whole ``generate`` call for one token.  Each figure stands beside
the least time that the device's own ceilings, measured first, allow.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import shapes
from benchmarks.device import (
    Ceilings,
    measure_ceilings,
    refuse_simulated,
    refuse_simulated_runtime,
)

from bedplate import Engine, SamplingParams

_SKIPPED, _COUNTED = 16, 128


@dataclass
class Report:
    """What was measured, printed at once and kept."""

    ceilings: Ceilings | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, what: str, ms: float, floor_us: float, **more: Any) -> None:
        share = floor_us / 1e3 / ms if floor_us else 0.0
        self.rows.append({"what": what, "ms": ms, "floor_ms": floor_us / 1e3} | more)
        rest = "".join(f", {name} {value:,.6g}" for name, value in more.items())
        print(f"{what:44s} {ms:10.3f} ms  {share:4.0%} of floor{rest}", flush=True)

    def floor_us(self, nbytes: int, flops: int = 0) -> float:
        return 0.0 if self.ceilings is None else self.ceilings.floor_us(nbytes, flops)


def prompts_of(engine: Engine, rng: np.random.Generator, lengths: list[int]) -> list[list[int]]:
    vocabulary = engine.runner.spec.vocab_size
    return [rng.integers(4, vocabulary, size=length).tolist() for length in lengths]


def decode_ms(
    engine: Engine, rng: np.random.Generator, batch: int, context: int
) -> tuple[float, float]:
    """Milliseconds a step, while every request decodes: the mean, and the longest."""
    core, steps = engine.core, _SKIPPED + _COUNTED
    params = SamplingParams(max_tokens=steps + 2, ignore_eos=True)
    arrived = 0

    def collect(_delta: Any) -> None:
        nonlocal arrived
        arrived += 1

    for prompt in prompts_of(engine, rng, [context] * batch):
        core.add_request(prompt, params, sink=collect)
    tokens, marks = 0, []
    while arrived < batch:
        tokens += len(core.step().token_ids)
        if _SKIPPED * batch <= tokens <= steps * batch:
            marks.append(time.perf_counter())
    longest = max(after - before for before, after in pairwise(marks))
    return (marks[-1] - marks[0]) / (len(marks) - 1) * 1e3, longest * 1e3


def run_decode(
    engine: Engine, report: Report, name: str, batches: list[int], contexts: list[int]
) -> None:
    rng = np.random.default_rng(0)
    for context, batch in product(contexts, batches):
        ms, longest = decode_ms(engine, rng, batch, context)
        mean = context + _SKIPPED + _COUNTED // 2
        floor = report.floor_us(shapes.step_bytes(engine, batch, mean))
        what = f"{name} decode, {batch} × {context}"
        report.add(what, ms, floor, tokens_s=batch / ms * 1e3, longest_ms=longest)


def run_prompts(engine: Engine, report: Report, name: str, cases: list[list[int]]) -> None:
    rng = np.random.default_rng(1)
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    for lengths in cases:
        times = []
        for _ in range(5):
            prompts = prompts_of(engine, rng, lengths)
            begin = time.perf_counter()
            engine.generate(prompts, params)
            times.append(time.perf_counter() - begin)
        ms = statistics.median(times) * 1e3
        floor = report.floor_us(
            shapes.step_bytes(engine, 0, 0), shapes.prompt_flops(engine, lengths)
        )
        what = f"{name} prompt, {len(lengths)} × {lengths[0]}"
        report.add(what, ms, floor, tokens_s=sum(lengths) / ms * 1e3)


def run_mixed(engine: Engine, report: Report, name: str, count: int) -> None:
    """``count`` requests of 100 to 1,024 tokens in and out, all at once.

    Graphs that wait for a quiet moment are captured first, as a server does between requests.
    """
    while engine.core.idle():
        pass
    rng = np.random.default_rng(2)
    lengths = rng.integers(100, 1025, size=count).tolist()
    wanted = rng.integers(100, 1025, size=count).tolist()
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in wanted]
    prompts = prompts_of(engine, rng, lengths)
    begin = time.perf_counter()
    engine.generate(prompts, params)
    seconds = time.perf_counter() - begin
    report.add(
        f"{name} mixed, {count} requests", seconds * 1e3, 0.0, tokens_s=sum(wanted) / seconds
    )


def run_memory(engine: Engine, report: Report, name: str) -> None:
    """Device memory besides weights and cache, as the driver counts it for the whole device."""
    free, total = torch.cuda.mem_get_info()
    pool = engine.runner.kv_pool
    runner = engine.runner.graph_runner
    parts = {
        "weights": shapes.parameter_bytes(engine),
        "cache": shapes.cell_bytes(engine) * (pool.num_tokens + pool.page_size),
    }
    other = total - free - sum(parts.values())
    parts |= {
        "graphs": runner.memory_bytes if runner else 0,
        "of torch": torch.cuda.memory_reserved() - sum(parts.values()),
    }
    for segment in torch.cuda.memory_snapshot():
        own = tuple(segment["segment_pool_id"]) != (0, 0)
        kind = "kept for graphs" if own else "kept for eager passes"
        unused = segment["total_size"] - segment["allocated_size"]
        parts[kind] = parts.get(kind, 0) + unused
    what = f"{name} memory besides weights and cache"
    report.rows.append({"what": what, "bytes": other} | parts)
    rest = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in parts.items())
    print(f"{what:44s} {other / 1e9:10.3f} GB  ({rest})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="+", choices=shapes.SHAPES)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--tests", default="decode,prompts,mixed,memory")
    parser.add_argument("--batches", default="1,8,32,128,256")
    parser.add_argument("--contexts", default="1024", help="tokens before the decode steps")
    parser.add_argument("--prompts", default="1x1024,1x3800,16x1024")
    parser.add_argument("--requests", type=int, default=256, help="of the mixed load")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="further settings of the engine")  # fmt: skip
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    refuse_simulated_runtime()
    batches = [int(size) for size in options.batches.split(",")]
    contexts = [int(length) for length in options.contexts.split(",")]
    prompts = [
        [int(length)] * int(count)
        for count, _, length in (case.partition("x") for case in options.prompts.split(","))
    ]
    tests = options.tests.split(",")
    extra = dict(pair.split("=", 1) for pair in options.set)
    settings = {name: json.loads(value) for name, value in extra.items()}
    device = torch.cuda.is_available() and options.backend != "cpu"
    report = Report(measure_ceilings() if device else None)
    print(report.ceilings, flush=True)
    for name in options.shapes:
        gc.collect()  # the engine before, and what the ceilings were measured with
        if device:
            torch.cuda.empty_cache()
        with tempfile.TemporaryDirectory() as folder:
            shapes.write_config(name, Path(folder))
            longest = max(
                *(context + 160 for context in contexts if "decode" in tests),
                *(n for case in prompts for n in case if "prompts" in tests),
                2100 if "mixed" in tests else 0,
                0,
            )
            begin = time.perf_counter()
            engine = Engine(
                folder, backend=options.backend, load_format="dummy", prefix_cache=False,
                **{
                    "max_context_len": longest + 16, "max_running_requests": max(*batches, 16),
                    **settings,
                },
            )  # fmt: skip
        with engine:
            refuse_simulated(engine)
            stages = {k: round(v, 2) for k, v in engine.runner.stage_seconds.items()}
            print(
                f"{name}: started in {time.perf_counter() - begin:.1f} s, {stages}", flush=True
            )
            if "decode" in tests:
                run_decode(engine, report, name, batches, contexts)
            if "prompts" in tests:
                run_prompts(engine, report, name, prompts)
            if "mixed" in tests:
                run_mixed(engine, report, name, options.requests)
            if "memory" in tests and device:
                run_memory(engine, report, name)
            if engine.runner.graph_runner is not None:
                print(engine.runner.graph_runner.stats, flush=True)
        if options.json is not None:
            ceilings = report.ceilings.as_json() if report.ceilings else None
            options.json.write_text(
                json.dumps({"ceilings": ceilings, "rows": report.rows}, indent=1)
            )


if __name__ == "__main__":
    main()
