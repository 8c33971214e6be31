# SPDX-License-Identifier: Apache-2.0
"""Runs where the plugin is installed beside bedplate."""

from __future__ import annotations

import json

import pytest

from bedplate.contract import Decision, StepStats
from bedplate.registry import survey

plugin = pytest.importorskip("bedplate_observer.plugin")

DECISION = Decision(point="backend", chosen="cpu", candidates=())
STATS = StepStats(
    step=3,
    mode="DECODE",
    num_requests=2,
    num_tokens=5,
    graph=None,
    graph_reason="off",
    host_us=1.0,
    total_us=2.0,
    free_tokens=9,
    queued=0,
)


def test_comes_through_the_door():
    (record,) = [r for r in survey(probe=False).records if r.name == "observer"]
    assert (record.kind, record.distribution) == ("plugin", "bedplate-observer")
    assert record.usable, record.reason


def test_writes_json_lines_and_starts_anew(tmp_path, monkeypatch):
    file = tmp_path / "lines"
    monkeypatch.setenv(plugin.FILE_VARIABLE, str(file))
    observer = plugin.Observer()
    observer.bedplate_decision(DECISION)
    for _ in range(2):
        observer.bedplate_step_finished(STATS)
    observer.bedplate_shutdown()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["decision", "step", "step", "total"]
    assert lines[1]["free_tokens"] == 9
    assert lines[-1] == {"event": "total", "decisions": 1, "steps": 2, "tokens": 10}
    assert (observer.decisions, observer.steps, observer.tokens) == (0, 0, 0)


def test_without_a_file_it_only_counts(tmp_path, monkeypatch):
    monkeypatch.delenv(plugin.FILE_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    observer = plugin.Observer()
    observer.bedplate_step_finished(STATS)
    assert observer.tokens == 5
    assert observer.bedplate_environment_report()[0].value == "nowhere"
    assert list(tmp_path.iterdir()) == []
