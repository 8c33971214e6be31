# SPDX-License-Identifier: Apache-2.0
"""The search for launch sizes inside a step, over steps whose times are made up."""

from __future__ import annotations

import pytest
from benchmarks import tune_step

PLACES = [("norm", (("size", 8),)), ("rope", (("heads", 2),)), ("sampling", ())]


class MadeUpStep:
    """Times follow from the sizes alone."""

    def __init__(self, time_of):
        self.time_of = time_of

    def places(self):
        return PLACES

    def record(self, changes):
        return changes

    def times_us(self, recorded):
        return [self.time_of(changes) for changes in recorded]


@pytest.fixture(autouse=True)
def changes(monkeypatch):
    """Two operations, with one and two things to change."""
    table = {
        "norm": lambda _key: [[{"a": value} for value in (1, 2, 3)]],
        "rope": lambda _key: [[{"a": value} for value in (1, 2)], [{"b": 1}, {"b": 2}]],
    }
    monkeypatch.setattr(tune_step, "CHANGES", table)


def time_of(changes):
    """Best with a 3 for the norm, and a 2 with a 1 for the other; each helps alone."""
    norm, rope = (changes.get(place, {}) for place in PLACES[:2])
    return 10 - norm.get("a", 0) - 2 * (rope.get("a") == 2) - (rope.get("b") == 1)


def test_changes_add_up_to_the_best():
    found = tune_step.descend(MadeUpStep(time_of), 60)
    assert (found["before_us"], found["after_us"]) == (10, 4)
    assert found["changes"] == [
        {"op": "norm", "key": {"size": 8}, "set": {"a": 3}},
        {"op": "rope", "key": {"heads": 2}, "set": {"a": 2, "b": 1}},
    ]


def test_what_is_no_faster_changes_nothing():
    found = tune_step.descend(MadeUpStep(lambda changes: 10 - 0.001 * len(changes)), 60)
    assert found["changes"] == []


def test_what_cannot_be_recorded_is_passed_over():
    def refuse(changes):
        if changes.get(PLACES[0], {}).get("a") == 3:
            raise ValueError("too large")
        return changes

    step = MadeUpStep(time_of)
    step.record = refuse
    assert tune_step.descend(step, 60)["after_us"] == 5


def test_nothing_is_tried_without_time():
    assert tune_step.descend(MadeUpStep(time_of), 0)["changes"] == []
