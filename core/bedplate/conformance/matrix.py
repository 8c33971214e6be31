# SPDX-License-Identifier: Apache-2.0
"""The support matrix in Markdown, from reports and nothing else."""

from __future__ import annotations

__all__ = ["level_table", "support_matrix"]

from collections import defaultdict
from typing import TYPE_CHECKING

from bedplate.conformance.levels import LEVELS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bedplate.conformance.check import Result
    from bedplate.conformance.report import Report

_FACTS = (
    "device", "arch", "compute dtypes", "cache dtypes", "page sizes", "attention", "graphs",
    "determinism", "torch", "begun",
)  # fmt: skip


def level_table() -> str:
    """Number, title and question of every level."""
    rows = [[f"L{level.number}", level.title, level.asks] for level in LEVELS]
    return _table(["level", "subject", "asks"], rows)


def support_matrix(reports: Sequence[Report]) -> str:
    """What was examined, the counts of each level, and who passes which operation and call.

    Args:
        reports: One per backend, in the order of the columns.
    """
    names = [report.backend for report in reports]
    facts = [[fact, *(r.facts.get(fact, "") for r in reports)] for fact in _FACTS]
    levels = [
        [f"L{level.number} {level.title}", *(_counts(r, level.number) for r in reports)]
        for level in LEVELS
    ]
    parts = [
        ("What was examined", _table(["", *names], facts)),
        ("Results by level", _table(["level", *names], levels)),
        ("Operations", _providers(reports, 2, "operation")),
        ("Kinds of attention calls", _providers(reports, 3, "call")),
    ]
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in parts)


def _counts(report: Report, level: int) -> str:
    if level not in report.levels:
        return "not run"
    return (
        ", ".join(f"{count} {name}" for name, count in report.counts(level).items()) or "none"
    )


def _providers(reports: Sequence[Report], level: int, what: str) -> str:
    """Subject → per backend, the implementations all of whose declared cases pass."""
    columns = [_passing(report, level) for report in reports]
    subjects = dict.fromkeys(subject for column in columns for subject in column)
    rows = [
        [f"`{subject}`", *(", ".join(column.get(subject, ())) or "none" for column in columns)]
        for subject in subjects
    ]
    return _table([what, *(report.backend for report in reports)], rows)


def _passing(report: Report, level: int) -> dict[str, list[str]]:
    found: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in report.of(f"L{level}/"):
        subject, provider = _subject(result.check, level)
        if subject:
            found[subject][provider].append(result)
    return {
        subject: [name for name, results in providers.items() if _pass(results)]
        for subject, providers in found.items()
    }


def _subject(check: str, level: int) -> tuple[str, str]:
    """What a check is about, and whose implementation it asks."""
    parts = check.split("/")
    if level == 2:
        return parts[1], parts[2]
    if parts[2] == "case":
        return parts[3].partition(".")[0], parts[1]
    return "", ""


def _pass(results: Iterable[Result]) -> bool:
    outcomes = {result.outcome for result in results}
    return "passed" in outcomes and "failed" not in outcomes


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
