# SPDX-License-Identifier: Apache-2.0
"""The conformance kit on layer B: no failure, no surplus, and the page knows every gap."""

from __future__ import annotations

import re

import pytest
from backends.npu.tests.kit import examine
from backends.npu.tests.layers import ROOT, Outcome, outcomes

from bedplate.conformance.check import matching
from bedplate.conformance.plugin import gaps
from bedplate.conformance.report import read_report

FAST = "0-5,8"
"""Levels of the default run; models take a minute, and ratios want a quiet machine."""
PAGE = (ROOT / "docs/reference/npu.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## The conformance kit on layer B")[2].partition("\n## ")[0]


def rows(pattern):
    """Groups of every row of the section's tables that fits."""
    return re.findall(rf"^\| {pattern} \|", SECTION, re.MULTILINE)


COUNTS = {int(level): (int(passed), int(left)) for level, passed, left in
          rows(r"L(\d) \w+ \| (\d+) \| (\d+)")}  # fmt: skip
"""Level → how many checks pass and how many are not declared, by the page."""
GAPS = {pattern: int(number) for pattern, number in rows(r"`([^`]+)` \| (\d+) \| .+")}
"""Pattern over checks → how many of them are not declared, by the page."""


@pytest.fixture
def report(request, tmp_path):
    """The report of a run over some levels."""
    path = tmp_path / "conformance.json"
    done = examine("--level", request.param, "--report", str(path), quiet=True)
    assert path.is_file(), done.stdout[-6000:]
    made = read_report(path)
    failed = [f"{r.check}: {r.reason}" for r in made.results if r.outcome == "failed"]
    passed = sum(r.outcome == "passed" for r in made.results)
    outcomes.append(Outcome("B", "the kit", passed, len(failed), text=done.stdout))
    assert failed == []
    assert done.returncode == 0, done.stdout[-6000:]
    return made


def agrees_with_the_page(report):
    """Counts of every level that was run, and the gaps one by one."""
    assert report.complete
    found = {level: report.counts(level) for level in report.levels}
    strange = [r for r in report.results if r.outcome not in ("passed", "not declared")]
    assert strange == [], "failed, surplus or a known gap"
    told = {n: (c.get("passed", 0), c.get("not declared", 0)) for n, c in found.items()}
    assert told == {level: COUNTS[level] for level in report.levels}
    lacking = [r for r in report.results if r.outcome == "not declared"]
    for result in lacking:
        fitting = [pattern for pattern in GAPS if matching(result.check, pattern)]
        assert len(fitting) == 1, (result.check, result.reason, fitting)
    levels = tuple(f"L{level}/" for level in report.levels)
    counted = {p: sum(matching(r.check, p) for r in lacking) for p in GAPS
               if p.startswith(levels)}  # fmt: skip
    assert counted == {p: n for p, n in GAPS.items() if p.startswith(levels)}
    assert all(gaps(report.results)), "a gap has no reason"


@pytest.mark.parametrize("report", [FAST], indirect=True)
def test_fast_levels(report):
    agrees_with_the_page(report)


@pytest.mark.slow
@pytest.mark.parametrize("report", ["0-8"], indirect=True)
def test_every_level(report):
    agrees_with_the_page(report)
