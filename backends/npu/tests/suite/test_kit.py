# SPDX-License-Identifier: Apache-2.0
"""The conformance kit notices mistakes of recorded decode, and nothing without one."""

from __future__ import annotations

import pytest
from backends.npu.tests.suite.test_mistakes import MISTAKES

from bedplate.conformance.examine import all_checks, examine
from bedplate.conformance.subject import Subject

pytestmark = pytest.mark.npu_silicon

GRAPHS = (
    "no update", "stale lengths", "lengths off by one", "one update too few", "misspelt key",
    "race with the replay before", "slots not refreshed", "padding over live pages",
    "missing scale",
)  # fmt: skip
"""Those of ``MISTAKES`` that recorded decode can have; without its scale attention is another,
but the same in a replay: that is for level 3."""
LEVEL = {"missing scale": 3}


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


def test_without_a_mistake_nothing_is_noticed(subject):
    assert failures(subject, 5) == []


@pytest.mark.parametrize("name", GRAPHS)
def test_mistake_is_noticed(subject, monkeypatch, record_property, name):
    subject.opened  # noqa: B018 - the self-test at activation would notice first
    MISTAKES[name](monkeypatch)
    found = failures(subject, LEVEL.get(name, 5))
    record_property("caught", "; ".join(found))
    assert found
