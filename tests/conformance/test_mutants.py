# SPDX-License-Identifier: Apache-2.0
"""The kit finds what is wrong with wrong backends, and finds nothing wrong with a sound one."""

from __future__ import annotations

import re

import pytest
from tests.conformance.kill import HEAVY, PAGE, kill, subject_of
from tests.conformance.mutants import MUTANTS, SURVIVORS

from bedplate.conformance.examine import all_checks, examine

FRESH_PROCESSES = {"heavy_import", "patches_the_core", "report_of_texts"}


def cost(name):
    """Fresh processes, whole models and timings are for the slow run."""
    level = MUTANTS[name].level
    slow = name in FRESH_PROCESSES or level in (6, 7)
    return pytest.param(name, marks=pytest.mark.slow) if slow else name


def page_row(name):
    """What the documentation says of a mutant."""
    rows = PAGE.read_text(encoding="utf-8").splitlines()
    return next(row for row in rows if row.startswith(f"| `{name}` |"))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", [cost(name) for name in MUTANTS])
def test_every_mutant_is_found_or_explained(name):
    found = kill(name)
    assert bool(found.check) != (name in SURVIVORS), found
    if found.check:
        assert f"`{found.check}`" in page_row(name), "run python -m tests.conformance.kill"


def test_the_page_has_all_mutants_and_the_rate():
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == set(MUTANTS)
    dead = len(MUTANTS) - len(SURVIVORS)
    assert f"finds {dead} of {len(MUTANTS)}, " in text


def test_at_least_forty_and_nineteen_of_twenty():
    assert len(MUTANTS) >= 40
    assert set(SURVIVORS) <= set(MUTANTS)
    assert len(SURVIVORS) <= len(MUTANTS) / 20
    assert {mutant.level for mutant in MUTANTS.values()} == set(range(9))


@pytest.mark.parametrize(("name", "level"), [("narrow_cache", 3), ("narrow_cache", 4)])
def test_nothing_is_wrong_with_narrow_caches(name, level):
    with subject_of(name) as subject:
        results = [
            examine(check, subject)
            for check in all_checks(subject, [level])
            if "float8" in check.id
        ]
    assert [(r.check, r.reason) for r in results if r.outcome != "passed"] == []
    assert len(results) >= 6


@pytest.mark.parametrize(
    "level", [1, 2, 3, 4, 5, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 6, 7))]
)
def test_nothing_is_wrong_with_the_sound_one(level):
    with subject_of("sound") as subject:
        results = [
            examine(check, subject)
            for check in all_checks(subject, [level])
            if check.id not in HEAVY
        ]
    wrong = [(r.check, r.reason) for r in results if r.outcome in ("failed", "surplus")]
    assert wrong == []
    assert sum(r.outcome == "passed" for r in results) >= 3
