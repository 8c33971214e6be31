# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin: options, parametrization, the five results, the report.

Loaded by name (``-p bedplate.conformance.plugin``), never for every run of every user.
Nothing is decided here; ``examine`` decides.
"""

from __future__ import annotations

__all__ = [
    "gaps",
    "parse_levels",
    "pytest_addoption",
    "pytest_configure",
    "pytest_report_teststatus",
    "pytest_runtest_logreport",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
]

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bedplate.conformance.check import OUTCOMES, Result
from bedplate.conformance.levels import LEVELS
from bedplate.conformance.report import Report, machine_facts, summary_rows, write_report
from bedplate.conformance.suite import PROPERTY, SUBJECTS
from bedplate.errors import BedplateError

if TYPE_CHECKING:
    from collections.abc import Iterable

RESULTS: pytest.StashKey[list[Result]] = pytest.StashKey()
_MARKS = {"passed": ".", "failed": "F", "not declared": "-", "known gap": "g", "surplus": "+"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the kit."""
    group = parser.getgroup("bedplate", "conformance of a bedplate backend")
    group.addoption("--backend", help="The backend to examine: NAME or NAME:INDEX.")
    group.addoption("--level", default="0-8", help="Levels: 2, 0-4, or 2,3.")
    group.addoption("--only", action="append", default=[], help="Pattern over checks.")
    group.addoption(
        "--report", dest="bedplate_report", type=Path, help="Write conformance.json."
    )
    group.addoption("--fail-surplus", action="store_true",
                    help="A surplus fails, too.")  # fmt: skip
    group.addoption("--baseline", type=Path, help="An earlier report; L7 is held against it.")
    group.addoption("--running", type=Path, help="Keep the name of the running check here.")
    group.addoption("--ops-trace", type=Path, help="Replay operations that trace-ops recorded.")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse levels and a backend that cannot be used before anything is collected."""
    config.stash[RESULTS] = []
    try:
        parse_levels(config.getoption("--level"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    name = config.getoption("--backend")
    if name is None:
        return
    try:
        SUBJECTS.get(name).opened  # noqa: B018 - opening it is the point
    except BedplateError as error:
        raise pytest.UsageError(f"'{name}' cannot be examined: {error}") from None


def parse_levels(text: str) -> tuple[int, ...]:
    """``2``, ``0-4`` or ``2,3`` → level numbers.

    Raises:
        ValueError: Something in it is no level.
    """
    known = [level.number for level in LEVELS]
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ValueError(f"--level {text!r}: {part!r} is no level; write 2, 0-4, or 2,3")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not found or set(found) - set(known):
        raise ValueError(f"--level {text!r}: levels are {known[0]} to {known[-1]}")
    return tuple(sorted(set(found)))


def _result(properties: Iterable[tuple[str, object]]) -> Result | None:
    data: Any = dict(properties).get(PROPERTY)
    return None if data is None else Result.from_json(data)


def pytest_report_teststatus(
    report: pytest.TestReport, config: pytest.Config
) -> tuple[str, str, str] | None:
    """The kit's own five words instead of pytest's."""
    result = _result(report.user_properties) if report.when == "call" else None
    if result is None:
        return None
    return result.outcome, _MARKS[result.outcome], result.outcome.upper()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the result; ends the run when the device itself has failed."""
    if report.when != "call" or not SUBJECTS.config:
        return
    result = _result(report.user_properties)
    if result is not None:
        SUBJECTS.config.stash[RESULTS].append(result)
        if result.outcome == "failed":
            _stop_if_the_device_is_lost(result)


def _stop_if_the_device_is_lost(result: Result) -> None:
    """After an error from which a device does not recover, every later failure would lie."""
    for subject in SUBJECTS.opened():
        try:
            subject.bound.runtime.synchronize()
        except Exception as error:
            pytest.exit(f"the device is lost after {result.check}: {error}", returncode=3)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report, then give the device back."""
    config = session.config
    path, results = config.getoption("bedplate_report"), config.stash[RESULTS]
    subjects = SUBJECTS.opened()
    if path is not None and subjects:
        report = Report(
            backend=subjects[0].name,
            facts=machine_facts(subjects[0]),
            complete=not config.getoption("--only") and len(results) == session.testscollected,
            levels=parse_levels(config.getoption("--level")),
            results=tuple(results),
        )
        write_report(report, path)
    SUBJECTS.close()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A row per level; then what is not simply passed, once each."""
    results = config.stash[RESULTS]
    if not results:
        return
    terminalreporter.section("conformance")
    head = ["level", "", *OUTCOMES]
    rows = [head, *summary_rows(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        line = "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))
        terminalreporter.write_line(line.rstrip())
    for result in results:
        if result.outcome in ("failed", "known gap", "surplus"):
            terminalreporter.write_line(f"{result.outcome}: {result.check}: {result.reason}")
            if result.outcome == "failed":
                terminalreporter.write_line(f"    {result.reproducer}")
    for reason, checks in gaps(results).items():
        terminalreporter.write_line(f"not declared: {', '.join(checks)}: {reason}")


def gaps(results: Iterable[Result]) -> dict[str, list[str]]:
    """Reason → what is not declared for it: identifiers, cut where several begin alike."""
    found: dict[str, Counter[str]] = {}
    for result in results:
        if result.outcome == "not declared":
            begin = result.check.rpartition(".")[0] or result.check
            found.setdefault(result.reason, Counter())[begin] += 1
    return {
        reason: [name if n == 1 else f"{name}.* ({n})" for name, n in names.items()]
        for reason, names in found.items()
    }
