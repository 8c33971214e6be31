# SPDX-License-Identifier: Apache-2.0
"""``bedplate new-backend``: a distribution of your own that runs before you edit it."""

from __future__ import annotations

__all__ = ["command"]

from pathlib import Path

import click

from bedplate.errors import ConfigError
from bedplate.registry.enumerate import enumerate_plugins, name_problem
from bedplate.template import render


@click.command("new-backend")
@click.argument("name")
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    help="Folder to write; must be empty or absent. Default: bedplate-NAME.",
)
def command(*, name: str, into: Path | None) -> None:
    """Write a complete backend called NAME: it installs, passes the kit and generates.

    Everything is delegated to plain torch; replace part by part what your device does better.

    \b
    Examples:
      bedplate new-backend acme
      cd bedplate-acme && pip install -e '.[test]'
      bedplate generate --backend acme -p "What is 12 + 30?"
    """  # noqa: D301 - click reads the control character
    problem = name_problem(name, enumerate_plugins())
    if problem:
        raise ConfigError(f"A new backend cannot have that name: {problem}. Choose another.")
    folder = Path(f"bedplate-{name.replace('_', '-')}") if into is None else into
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} is there already, and nothing of yours is overwritten. Name an empty "
            "folder with --into."
        )
    for path, text in render(name).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        click.echo(target)
    click.echo(f"Next: cd {folder} && pip install -e '.[test]' && pytest")
