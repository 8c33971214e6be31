# SPDX-License-Identifier: Apache-2.0
"""Run a check and name its outcome.

The only place that knows the five results: levels raise or return, and pytest, the report and
the mutants all come through here.
"""

from __future__ import annotations

__all__ = ["all_checks", "examine"]

import time
import zlib
from datetime import UTC, date, datetime
from importlib import import_module
from typing import TYPE_CHECKING

from bedplate.conformance.check import Check, Leave, Outcome, Result, Wrong, matching
from bedplate.conformance.levels import LEVELS
from bedplate.errors import BedplateError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from bedplate.conformance.subject import Subject
    from bedplate.contract.conformance import KnownGap


def all_checks(subject: Subject, levels: Collection[int] | None = None) -> Iterator[Check]:
    """Every check of the levels, made for what the backend declares.

    Args:
        subject: The backend.
        levels: Which; all when not given.
    """
    for level in LEVELS:
        if levels is None or level.number in levels:
            yield from import_module(level.module).checks(subject)


def examine(check: Check, subject: Subject, today: date | None = None) -> Result:
    """One check, one result; raises nothing but interrupts."""
    begin = time.perf_counter()
    outcome, reason, numbers = _run(check, subject)
    gap = _gap_of(check, subject)
    if gap is not None:
        outcome, reason = _excused(outcome, reason, gap, today or datetime.now(UTC).date())
    return Result(
        check=check.id,
        outcome=outcome,
        reason=reason,
        reproducer=f"bedplate conformance --backend {subject.name} --only '{check.id}'",
        seconds=round(time.perf_counter() - begin, 4),
        numbers=numbers,
    )


def _run(check: Check, subject: Subject) -> tuple[Outcome, str, dict[str, float]]:
    declared = check.declared
    if not declared and not check.attempt:
        return "not declared", declared.reason, {}
    _seed(check.id)
    try:
        with subject.examined_by(check.id):
            numbers = check.run(subject) or {}
    except Leave as answer:
        return "not declared", str(answer), {}
    except Exception as error:
        if declared:
            return "failed", _what(error), {}
        return "not declared", declared.reason, {}
    if declared:
        return "passed", "", numbers
    return "surplus", f"works, but is not declared: {declared.reason}", numbers


def _seed(text: str) -> None:
    """The same numbers whenever this check runs, whatever ran before."""
    import torch

    torch.manual_seed(zlib.crc32(text.encode()))


def _what(error: Exception) -> str:
    """What is wrong, in one paragraph."""
    if isinstance(error, Wrong | BedplateError):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


def _gap_of(check: Check, subject: Subject) -> KnownGap | None:
    gaps = subject.profile.gaps
    return next((gap for gap in gaps if matching(check.id, gap.checks)), None)


def _excused(outcome: Outcome, reason: str, gap: KnownGap, today: date) -> tuple[Outcome, str]:
    """A gap excuses a failure until its last day, and is itself a mistake once it is closed."""
    if outcome == "passed":
        return "surplus", f"the known gap '{gap.reason}' is closed: remove it from the profile"
    if outcome != "failed":
        return outcome, reason
    if date.fromisoformat(gap.expires) < today:
        return "failed", f"known gap expired on {gap.expires} ({gap.link}): {reason}"
    return "known gap", f"{gap.reason} ({gap.link}, until {gap.expires}): {reason}"
