# SPDX-License-Identifier: Apache-2.0
"""``bedplate trace-ops``: which operations a real run calls, as cases for any backend."""

from __future__ import annotations

__all__ = ["command"]

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from bedplate.config import resolve_config

if TYPE_CHECKING:
    from bedplate.engine.engine import Engine
    from bedplate.registry.ops import Operations

_PROMPTS = ([11, 12, 13, 14, 15, 16, 17], [21], [31, 32, 33] * 11)
"""Token ids: what is traced are shapes, and these exist in every vocabulary."""


@click.command("trace-ops")
@click.option("--model", help="Folder of a checkpoint; the bundled demo model if not given.")
@click.option("--backend", help="Where to run it; any backend gives the same calls.")
@click.option("--dtype", help="auto, float32, bfloat16, …")
@click.option(
    "-n", "--max-tokens", type=int, default=4, show_default=True, help="Decode steps."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("ops.jsonl"), show_default=True,
    help="The file to write.",
)  # fmt: skip
def command(
    *, model: str | None, backend: str | None, dtype: str | None, max_tokens: int, out: Path
) -> None:
    """Run a model and write every distinct call of an operation: shapes and types, no values.

    Replay the file on another backend with
    `bedplate conformance --backend NAME --ops-trace FILE --only 'L2/*/recorded*'`.

    \b
    Examples:
      bedplate trace-ops --out ops.jsonl
      bedplate trace-ops --model ./checkpoint --dtype bfloat16 --out ops.jsonl
    """  # noqa: D301 - click reads the control character
    from bedplate.reference.ops import OPERATIONS
    from bedplate.registry import DecisionLog, open_backend
    from bedplate.runner.op_trace import OpTrace, TracedOperations

    settings = {"model": model, "backend": backend, "dtype": dtype, "graphs": False}
    config = resolve_config(settings, options=True)
    decisions, trace = DecisionLog(), OpTrace()
    bound = open_backend(config=config, reference_ops=OPERATIONS, decisions=decisions)
    # The record names the registry's own class, of which a start needs what this has.
    ops = cast("Operations", TracedOperations(bound.ops, trace))
    traced = replace(bound, ops=ops)
    from bedplate.engine.engine import Engine

    with Engine.from_backend(traced, decisions) as engine:
        _run(engine, max_tokens)
        trace.facts = {"model": model or "demo", "backend": bound.name,
                       "dtype": engine.runner.plan.dtype}  # fmt: skip
    trace.write(out)
    for op, count in sorted(trace.counts().items()):
        click.echo(f"{op}: {count} distinct calls")
    click.echo(f"wrote {out}")


def _run(engine: Engine, max_tokens: int) -> None:
    from bedplate.runner.sampling_params import SamplingParams

    vocabulary = engine.runner.spec.vocab_size
    prompts = [[token % vocabulary for token in prompt] for prompt in _PROMPTS]
    engine.generate(prompts, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
