# SPDX-License-Identifier: Apache-2.0
"""Find launch sizes inside a whole decode step, where kernels share the cores with each other.

    python -m benchmarks.tune_step qwen3-0.6b --backend cuda --batches 1,8,32 --json FILE

One change at a time, for every choice that the step makes: a step is recorded with the change,
replayed in turns with the best so far, and kept if it is faster.  Sizes that are best alone
(``benchmarks.tune``) need not be best here: a chained kernel that begins early takes room from
the one before it.  ``kernels/bedplate_triton/configs`` is written by hand from what several
shapes agree on.  Lengths stand still while steps are replayed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bedplate import Engine, SamplingParams
from bedplate_triton import configs
from benchmarks import shapes
from benchmarks.device import refuse_simulated, refuse_simulated_runtime, time_us

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bedplate.graph.routes import Captured

Change = dict[str, Any]
Place = tuple[str, tuple[tuple[str, Any], ...]]
"""An operation and the key with which its configuration was asked for."""

_ROUNDS, _REPLAYS = 5, 8
_GAIN = 0.9975
"""A change is kept below this ratio: captures with the same sizes, made for a comparison on an
H200, came out between 0.998 and 1.003."""
_RELEASES = [{"release": moment} for moment in ("begin", "input", "end")]


def attention_changes(key: Change) -> list[list[Change]]:
    tiles = [(n, s) for n in (32, 64, 128) for s in (2, 3, 4) if n * s <= 256]
    return [
        [{"BLOCK_N": n, "num_stages": s} for n, s in tiles],
        [{"num_warps": warps} for warps in (2, 4, 8)],
        [{"programs_a_core": programs} for programs in (1, 2, 3, 4, 6)],
        [{"tokens_a_split": tokens} for tokens in (64, 128, 192, 256, 512)],
        [{"settled": settled} for settled in (False, True)],
        _RELEASES,
        [{"merge": "last"}, {"merge": "kernel"}] if key["batch"] <= 16 else [],
        [{"merge_release": each["release"]} for each in _RELEASES],
    ]


def linear_changes(key: Change) -> list[list[Change]]:
    if key["m"] <= 4:
        forms = [{"rows": r, "tiles": t} for r in (1, 2, 4) for t in (1, 2)]
        return [forms, [{"depth": depth} for depth in (2, 4, 6)], _RELEASES]
    if key["m"] > 32:
        return []
    blocks = [(32, 128, 8), (32, 256, 4), (64, 128, 6), (64, 64, 8), (64, 256, 3)]
    splits = (1,) if key["act"] or key["n"] > 4096 else (1, 2, 4, 6)
    return [
        [
            {"block_n": n, "block_k": k, "num_stages": s, "swap": swap, "splits": split}
            for n, k, s in blocks
            for swap in (False, True)
            for split in splits
        ],
        [{"num_stages": stages} for stages in (4, 6, 8)],
        [{"early": tiles} for tiles in (0, 1, 2, 3, 4)],
        _RELEASES,
    ]


def norm_changes(_key: Change) -> list[list[Change]]:
    return [[{"num_warps": warps} for warps in (2, 4, 8)], _RELEASES]


def rope_changes(_key: Change) -> list[list[Change]]:
    return [[{"heads": h, "num_warps": w} for h in (2, 4, 8, 16) for w in (1, 2)], _RELEASES]


CHANGES: dict[str, Callable[[Change], list[list[Change]]]] = {
    "decode_attention": attention_changes,
    "linear": linear_changes,
    "norm": norm_changes,
    "rope": rope_changes,
}


class Step:
    """A decode step of some requests that wait for the next token.

    Args:
        engine: With the bucket of this batch captured.
        batch: Requests.
        context: Their tokens.
    """

    def __init__(self, engine: Engine, batch: int, context: int) -> None:
        self._engine, self._batch = engine, batch
        graphs = engine.runner.graph_runner
        assert graphs is not None
        self._graphs = graphs
        with engine.runner.bound.runtime.inference_guard():
            graphs.capture_next(batch)  # unless it was captured at the start
        (self._key,) = (key for key in graphs.captured if key.batch_size == batch)
        rng, core = np.random.default_rng(0), engine.core
        params = SamplingParams(ignore_eos=True)
        vocabulary = engine.runner.spec.vocab_size
        for _ in range(batch):
            core.add_request(rng.integers(4, vocabulary, size=context).tolist(), params)
        tokens = 0
        while tokens < 4 * batch:
            tokens += len(core.step().token_ids)

    def places(self) -> list[Place]:
        """Every choice of launch sizes that the step makes, in order."""
        seen: dict[Place, None] = {}
        choose = configs.choose

        def note(op: str, features: Any, **key: Any) -> Any:
            seen.setdefault((op, tuple(key.items())))
            return choose(op, features, **key)

        configs.choose = note
        try:
            self._graphs.rehearse((self._batch,))
        finally:
            configs.choose = choose
        return list(seen)

    def record(self, changes: dict[Place, Change]) -> Captured:
        """The step, recorded with these sizes."""
        with ExitStack() as stack:
            for (op, key), values in changes.items():
                stack.enter_context(configs.override(op, dict(key), **values))
            self._graphs.rehearse((self._batch,))
            with self._graphs.capture_stream():
                captured = self._graphs.capture_one_batch_size(self._key)
        self._engine.core.step()  # a capture leaves the rows as padding
        return captured

    def times_us(self, recorded: Sequence[Captured]) -> list[float]:
        """Median time of a replay of each, in turns."""
        times: list[list[float]] = [[] for _ in recorded]
        loop = self._engine.runner.decode_loop
        with self._engine.runner.bound.runtime.inference_guard():
            for _ in range(_ROUNDS):
                for captured, mine in zip(recorded, times, strict=True):
                    if loop is not None:
                        loop.hold()  # lengths stand still
                    mine.append(time_us(partial(self._graphs.play, captured), _REPLAYS))
        return [statistics.median(mine) for mine in times]

    def close(self) -> None:
        """End the requests."""
        core = self._engine.core
        core.abort_all()
        while core.has_work:
            core.step()


def dimensions(places: Sequence[Place]) -> Iterator[tuple[Place, list[Change]]]:
    """What can be changed, one after the other."""
    for op, key in places:
        if op in CHANGES:
            for dimension in CHANGES[op](dict(key)):
                yield (op, key), dimension


def descend(step: Step, seconds: float) -> dict[str, Any]:
    """Try one change after the other until none is faster or time is up."""
    places = step.places()
    best: dict[Place, Change] = {}
    first = fastest = step.record(best)
    deadline, found = time.perf_counter() + seconds, True
    while found and time.perf_counter() < deadline:
        found = False
        for place, dimension in dimensions(places):
            ratio, kept, kept_changes = _GAIN, fastest, best
            mine = best.get(place, {})
            for change in dimension:
                changes = {**best, place: {**mine, **change}}
                if changes == best or time.perf_counter() > deadline:
                    continue
                try:
                    recorded = step.record(changes)
                except Exception as error:
                    print(f"   fails {place[0]} {changes[place]}: {str(error)[:90]!r}")
                    continue
                ours, other = step.times_us([recorded, fastest])
                print(f"   {ours / other:.4f} {place[0]} {dict(place[1])} {changes[place]}")
                if ours / other < ratio:
                    ratio, kept, kept_changes = ours / other, recorded, changes
            if ratio < _GAIN:
                best, fastest, found = kept_changes, kept, True
    before, after = step.times_us([first, fastest])
    made = [{"op": op, "key": dict(key), "set": best[op, key]} for op, key in best]
    return {"before_us": before, "after_us": after, "changes": made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=shapes.SHAPES)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=60, help="for each batch")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    refuse_simulated_runtime()
    batches = [int(batch) for batch in options.batches.split(",")]
    settings = {
        "backend": options.backend, "load_format": "dummy", "prefix_cache": False,
        "max_context_len": options.context + 4200, "max_running_requests": max(batches),
        "capture_sizes": tuple(sorted(batches)),
    }  # fmt: skip
    results = []
    # Workspaces are sized at the start, here for the most splits that are tried.
    with tempfile.TemporaryDirectory() as folder, configs.override(
        "decode_attention", programs_a_core=8, tokens_a_split=64
    ):  # fmt: skip
        shapes.write_config(options.shape, Path(folder))
        engine = Engine(folder, **settings)
    with engine:
        refuse_simulated(engine)
        for batch in batches:
            step = Step(engine, batch, options.context)
            found = {"batch": batch, "context": options.context}
            found |= descend(step, options.seconds)
            results.append(found)
            print(f"{options.shape}, {batch} × {options.context}: {found}", flush=True)
            step.close()
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
