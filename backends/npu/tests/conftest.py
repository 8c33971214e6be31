# SPDX-License-Identifier: Apache-2.0
"""Counts per layer at the end of a run, under their fixed labels."""

from __future__ import annotations

from collections import defaultdict

from backends.npu.tests.layers import LABELS, outcomes


def pytest_terminal_summary(terminalreporter):
    """One line a layer; skipped layers say why in pytest's own summary."""
    schema = sum(
        "test_ops_schemas" in report.nodeid and report.when == "call"
        for report in terminalreporter.stats.get("passed", ())
    )
    counts = defaultdict(lambda: [0, 0], {"A": [schema, 0]} if schema else {})
    for outcome in outcomes:
        counts[outcome.layer][0] += outcome.passed
        counts[outcome.layer][1] += outcome.failed
    for layer, (passed, failed) in sorted(counts.items()):
        line = f"npu layer {layer}, {LABELS[layer]}: {passed} passed, {failed} failed"
        terminalreporter.write_line(line)
