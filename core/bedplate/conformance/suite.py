# SPDX-License-Identifier: Apache-2.0
"""The whole kit as a test module: ``from bedplate.conformance.suite import *``.

The backend is named by ``--backend`` where the plugin is loaded, by ``BACKEND = "acme"`` in
the module that imports this, or by ``BEDPLATE_BACKEND``; nothing is guessed.  ``LEVEL = "0-4"``
in the module keeps to some levels.
"""

from __future__ import annotations

__all__ = [
    "PROPERTY",
    "SUBJECTS",
    "conformance_session",
    "pytest_generate_tests",
    "test_conformance",
]

import re
from typing import TYPE_CHECKING

import pytest

from bedplate import env
from bedplate.conformance.check import matching
from bedplate.conformance.examine import all_checks, examine
from bedplate.conformance.report import read_report
from bedplate.conformance.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bedplate.conformance.check import Check

PROPERTY = "bedplate_result"
"""Name of the property of a test's report that holds the result."""


class Subjects:
    """Backends that are open in this session, by name.

    Attributes:
        config: pytest's configuration, once tests were generated.
    """

    def __init__(self) -> None:
        self.config: pytest.Config | None = None
        self._subjects: dict[str, Subject] = {}

    def get(self, name: str) -> Subject:
        """The subject of that name; opened when first asked for."""
        if name not in self._subjects:
            self._subjects[name] = Subject(name)
        return self._subjects[name]

    def opened(self) -> list[Subject]:
        """All subjects."""
        return list(self._subjects.values())

    def close(self) -> None:
        """Give all devices back."""
        for subject in self._subjects.values():
            subject.close()
        self._subjects.clear()


SUBJECTS = Subjects()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per check that is asked for."""
    if metafunc.function is not test_conformance:
        return
    SUBJECTS.config = metafunc.config
    subject = SUBJECTS.get(_backend(metafunc))
    _prepare(subject, metafunc.config)
    levels, patterns = _wanted(metafunc)
    checks = [
        check
        for check in all_checks(subject, levels)
        if not patterns or any(matching(check.id, pattern) for pattern in patterns)
    ]
    metafunc.parametrize(
        ("check", "subject"), [(check, subject) for check in checks],
        ids=[check.id for check in checks],
    )  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def conformance_session(pytestconfig: pytest.Config) -> Iterator[None]:
    """Gives devices back at the end; where the plugin is loaded, it does, after its report."""
    yield
    if not pytestconfig.pluginmanager.hasplugin("bedplate.conformance.plugin"):
        SUBJECTS.close()


def test_conformance(
    check: Check, subject: Subject, record_property: Callable[[str, object], None],
    pytestconfig: pytest.Config,
) -> None:  # fmt: skip
    """One check; see the report for what became of it."""
    running = pytestconfig.getoption("--running", None)
    if running is not None:
        running.write_text(check.id, encoding="utf-8")
    result = examine(check, subject)
    record_property(PROPERTY, result.to_json())
    if result.outcome == "failed":
        pytest.fail(f"{result.reason}\n{result.reproducer}", pytrace=False)
    if result.outcome == "not declared":
        pytest.skip(f"not declared: {result.reason}")
    if result.outcome == "known gap":
        pytest.xfail(result.reason)
    if result.outcome == "surplus" and pytestconfig.getoption("fail_surplus", False):
        pytest.fail(f"surplus: {result.reason}", pytrace=False)


def _backend(metafunc: pytest.Metafunc) -> str:
    name = (
        metafunc.config.getoption("--backend", None)
        or getattr(metafunc.module, "BACKEND", None)
        or env.BACKEND.get()
    )
    if not name:
        raise pytest.UsageError(
            "The kit examines the backend that you name. Name it: --backend NAME with "
            "-p bedplate.conformance.plugin, BACKEND = 'NAME' in the test module, or "
            "BEDPLATE_BACKEND=NAME. To see names: `bedplate backends`"
        )
    return str(name)


def _prepare(subject: Subject, config: pytest.Config) -> None:
    """Give the subject what the plugin's options name."""
    subject.ops_trace = config.getoption("--ops-trace", None)
    baseline = config.getoption("--baseline", None)
    if baseline is not None:
        results = read_report(baseline).of("L7/")
        subject.baseline = {result.check: result.numbers for result in results}


def _wanted(metafunc: pytest.Metafunc) -> tuple[tuple[int, ...] | None, list[str]]:
    """Levels and patterns: the plugin's options, or the module's word where it is absent."""
    from bedplate.conformance.plugin import parse_levels

    text = metafunc.config.getoption("--level", None) or getattr(metafunc.module, "LEVEL", None)
    patterns = metafunc.config.getoption("--only", None) or []
    levels = None if text is None else parse_levels(text)
    named = [re.match(r"L(\d)/", pattern) for pattern in patterns]
    if named and all(named):  # other levels need not even be loaded
        asked = {int(match[1]) for match in named if match}
        levels = tuple(sorted(asked if levels is None else asked & set(levels)))
    return levels, patterns
