# SPDX-License-Identifier: Apache-2.0
"""Plain tables and JSON for listings; every command prints through here."""

from __future__ import annotations

__all__ = ["format_table", "print_json"]

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart; the last column is not padded."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def print_json(data: object) -> None:
    """One document on standard output."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))
