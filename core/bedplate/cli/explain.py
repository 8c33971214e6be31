# SPDX-License-Identifier: Apache-2.0
"""``bedplate explain``: every choice of a start-up with each candidate and its reason."""

from __future__ import annotations

__all__ = ["command"]

from typing import TYPE_CHECKING

import click

from bedplate.cli.tables import format_table, print_json
from bedplate.config import resolve_config
from bedplate.errors import BedplateError
from bedplate.registry import DecisionLog, explain_backend
from bedplate.registry.door import backend_request

if TYPE_CHECKING:
    from bedplate.config import EngineConfig
    from bedplate.contract.decisions import Decision


@click.command("explain")
@click.option("--backend", help="auto, NAME, NAME:INDEX, or an order of preference A,B.")
@click.option("--model", help="Folder of a checkpoint: explain its whole start-up.")
@click.option("--config", type=click.Path(), help="Configuration file (TOML).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    *, backend: str | None, model: str | None, config: str | None, as_json: bool
) -> None:
    """Every choice of a start-up, with its candidates.

    Without a model: which backend, without taking a device.  A refused start-up is explained
    too, and then ends with its error.

    \b
    JSON: {"decisions": [{"point", "chosen", "candidates": [{"name", "verdict", "reason"}],
    "detail": {}}], "error": {"code", "message"} or null}

    \b
    Examples:
      bedplate explain
      bedplate explain --backend cpu --model ./checkpoint --json
    """  # noqa: D301 - click reads the control character
    settings = resolve_config({"backend": backend, "model": model}, options=True, path=config)
    decisions, error = _explain(settings)
    if as_json:
        refusal = {"code": error.code, "message": error.message} if error else None
        print_json({"decisions": decisions.to_json(), "error": refusal})
    else:
        click.echo("\n\n".join(_text(decision) for decision in decisions))
    if error is not None:
        raise error


def _explain(settings: EngineConfig) -> tuple[DecisionLog, BedplateError | None]:
    decisions = DecisionLog()
    if settings.model is None:
        selection, _survey = explain_backend(backend_request(settings), decisions)
        return decisions, selection.error
    from bedplate.runner.startup import start

    try:
        start(settings, decisions=decisions).shutdown()
    except BedplateError as error:
        return decisions, error
    return decisions, None


def _text(decision: Decision) -> str:
    detail = ", ".join(f"{name} {value}" for name, value in decision.detail.items())
    head = f"{decision.point}: {decision.chosen or 'nothing'}"
    rows = [[f"  {c.name}", c.verdict, c.reason] for c in decision.candidates]
    table = format_table(["  candidate", "verdict", "reason"], rows)
    return "\n".join((head, f"  {detail}", table) if detail else (head, table))
