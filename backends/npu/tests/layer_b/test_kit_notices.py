# SPDX-License-Identifier: Apache-2.0
"""The conformance kit notices mistakes in the backend.

That it notices nothing without one is ``backends/npu/tests/test_kit.py``.
"""

from __future__ import annotations

import pytest
from backends.npu.tests.suite.test_mistakes import MISTAKES

from bedplate.conformance.examine import all_checks, examine
from bedplate.conformance.subject import Subject

pytestmark = pytest.mark.npu_silicon

NOTICED_BY = {
    "no update": 5,
    "stale lengths": 5,
    "lengths off by one": 5,
    "one update too few": 5,
    "misspelt key": 5,
    "race with the replay before": 5,
    "slots not refreshed": 5,
    "padding over live pages": 5,
    "missing scale": 3,
    "window counts wrongly": 3,
    "keys and values swapped": 3,
}
"""Some of ``MISTAKES`` → the level that has to notice: an eager pass makes the later ones, too,
so that a replay is no different."""


@pytest.fixture(scope="module")
def subject():
    opened = Subject("npu")
    yield opened
    opened.close()


def failures(subject, level):
    """Checks of a level that fail, up to the first."""
    subject._kept.clear()  # a bench that was captured before the mistake does not have it
    for check in all_checks(subject, [level]):
        result = examine(check, subject)
        if result.outcome == "failed":
            return [f"{result.check}: {result.reason}"]
    return []


@pytest.mark.parametrize("name", NOTICED_BY)
def test_mistake_is_noticed(subject, monkeypatch, record_property, name):
    subject.opened  # noqa: B018 - the self-test at activation would notice first
    MISTAKES[name](monkeypatch)
    found = failures(subject, NOTICED_BY[name])
    record_property("caught", "; ".join(found))
    assert found
