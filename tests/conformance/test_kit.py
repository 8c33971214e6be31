# SPDX-License-Identifier: Apache-2.0
"""The kit's own parts: five results, sentinels, reports, levels, and the checks as a list."""

from __future__ import annotations

from datetime import date
from types import SimpleNamespace

import pluggy
import pytest
import torch
from tests.conformance.kill import subject_of

from bedplate.conformance.check import Check, Leave, Result, Wrong
from bedplate.conformance.examine import all_checks, examine
from bedplate.conformance.levels import LEVELS
from bedplate.conformance.levels.speed import _hook_calls
from bedplate.conformance.matrix import support_matrix
from bedplate.conformance.placing import Guards
from bedplate.conformance.plugin import parse_levels
from bedplate.conformance.report import Report, read_report, summary_rows, write_report
from bedplate.conformance.subject import Subject
from bedplate.contract import ConformanceProfile, KnownGap, Support, WiderTolerance
from bedplate.errors import ConfigError
from bedplate.reference.rope import RopeTable

TODAY = date(2026, 11, 28)
YES, NO = Support.yes(), Support.no("it is off")


def subject_with(*gaps, tolerances=()):
    """A subject that is only its profile."""
    subject = Subject("acme")
    vars(subject)["profile"] = ConformanceProfile(gaps=gaps, tolerances=tolerances)
    return subject


def gap(expires="2026-12-01", checks="L2/a*"):
    return KnownGap(checks=checks, reason="slow", link="http://x/1", expires=expires)


def works(_subject):
    return {"ratio": 1.0}


def breaks(_subject):
    raise Wrong("it is broken")


def leaves(_subject):
    raise Leave("nothing to see")


@pytest.mark.parametrize(
    ("run", "declared", "attempt", "gaps", "outcome", "words"),
    [
        (works, YES, True, [], "passed", ""),
        (breaks, YES, True, [], "failed", "it is broken"),
        (works, NO, True, [], "surplus", "it is off"),
        (breaks, NO, True, [], "not declared", "it is off"),
        (works, NO, False, [], "not declared", "it is off"),
        (leaves, YES, True, [], "not declared", "nothing to see"),
        (breaks, YES, True, [gap()], "known gap", "http://x/1"),
        (breaks, YES, True, [gap("2026-11-28")], "known gap", "until 2026-11-28"),
        (breaks, YES, True, [gap("2026-11-27")], "failed", "expired on 2026-11-27"),
        (breaks, YES, True, [gap(checks="L2/b*")], "failed", "it is broken"),
        (works, YES, True, [gap()], "surplus", "remove it from the profile"),
        (breaks, NO, True, [gap()], "not declared", "it is off"),
    ],
)
def test_outcomes(run, declared, attempt, gaps, outcome, words):
    check = Check(level=2, name="a/b", run=run, declared=declared, attempt=attempt)
    result = examine(check, subject_with(*gaps), TODAY)
    assert result.outcome == outcome
    assert words in result.reason
    assert result.reproducer == "bedplate conformance --backend acme --only 'L2/a/b'"
    assert result.numbers == ({"ratio": 1.0} if run is works and attempt else {})


def test_any_error_is_a_failure_that_names_its_type():
    check = Check(level=1, name="a", run=lambda _: 1 / 0)
    assert examine(check, subject_with()).reason.startswith("ZeroDivisionError: ")


def test_each_check_draws_the_same_numbers_whatever_ran_before():
    drawn = []
    check = Check(level=1, name="a", run=lambda _: drawn.append(float(torch.rand(()))))
    for seed in (1, 2):
        torch.manual_seed(seed)
        examine(check, subject_with())
    assert drawn[0] == drawn[1]


def test_a_wider_tolerance_holds_for_its_checks_alone():
    wider = WiderTolerance(checks="L2/linear/*", factor=3.0, reason="short sums")
    subject = subject_with(tolerances=(wider,))
    seen = {}
    for name in ("linear/x", "norm/x"):
        run = lambda s, name=name: seen.update({name: s.tolerance(2.0)})  # noqa: E731
        examine(Check(level=2, name=name, run=run), subject)
    assert seen == {"linear/x": 6.0, "norm/x": 2.0}
    assert subject.tolerance(2.0) == 2.0


@pytest.mark.parametrize("name", ["auto", "cpu,cuda", ""])
def test_one_backend_is_named_and_none_is_guessed(name):
    with pytest.raises(ConfigError):
        Subject(name)


# Sentinels.


def table():
    return {"x": torch.arange(12.0).view(3, 4), "n": torch.arange(3), "eps": 1e-6, "none": None}


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_placed_tensors_are_the_same_numbers(dtype, shifted):
    guards = Guards(torch.device("cpu"), spaced=("x",), shifted=shifted)
    given = {
        "x": table()["x"].to(dtype),
        "scalar": torch.tensor(3.0),
        "none": torch.empty(0, 4),
    }
    placed = guards.place(given)
    for name, tensor in given.items():
        assert torch.equal(placed[name], tensor)
        assert placed[name].shape == tensor.shape
    assert placed["x"].stride() == (7, 1)
    guards.check(())


def beside(placed):
    x = placed["x"]
    torch.as_strided(x, (1,), (1,), x.storage_offset() + 4).zero_()


def before(placed):
    x = placed["x"]
    torch.as_strided(x, (1,), (1,), x.storage_offset() - 1).zero_()


@pytest.mark.parametrize(
    ("act", "writes", "words"),
    [
        (beside, ("x",), "wrote beside 'x'"),
        (before, ("x",), "wrote beside 'x'"),
        (lambda p: p["x"].mul_(2), (), "changed 'x'"),
        (lambda p: p["rope"].cos.mul_(2), ("x",), "changed 'rope.cos'"),
        (lambda p: p["x"].mul_(2), ("x",), None),
        (lambda p: p["rope"].sin.mul_(2), ("rope",), None),
    ],
)
def test_sentinels(act, writes, words):
    guards = Guards(torch.device("cpu"), spaced=("x",))
    rope = RopeTable(cos=torch.ones(2, 3), sin=torch.ones(2, 3))
    placed = guards.place(table() | {"rope": rope})
    assert placed["rope"].style == rope.style
    act(placed)
    if words is None:
        guards.check(writes)
        return
    with pytest.raises(Wrong, match=words):
        guards.check(writes)


# Levels and checks.


@pytest.mark.parametrize(
    ("text", "levels"),
    [("2", (2,)), ("0-4", (0, 1, 2, 3, 4)), ("3,1", (1, 3)), ("1-2, 8", (1, 2, 8))],
)
def test_levels(text, levels):
    assert parse_levels(text) == levels


@pytest.mark.parametrize("text", ["", "9", "x", "1-", "2-1", "-1", "0-9"])
def test_levels_that_are_none(text):
    with pytest.raises(ValueError, match="--level"):
        parse_levels(text)


def test_checks_have_distinct_names_that_fit_a_command():
    with subject_of("sound") as subject:
        names = [check.id for check in all_checks(subject)]
    assert len(set(names)) == len(names) > 500
    assert [name for name in names if set(name) & set(" '\"*?[]")] == []
    assert {int(name[1]) for name in names} == {level.number for level in LEVELS}


def test_hook_calls_are_counted():
    manager = pluggy.PluginManager("bedplate")
    spec, impl = pluggy.HookspecMarker("bedplate"), pluggy.HookimplMarker("bedplate")
    manager.add_hookspecs(SimpleNamespace(ask=spec(lambda: None)))

    class Plugin:
        @impl
        def ask(self):
            return 1

    manager.register(Plugin())
    engine = SimpleNamespace(step=lambda: [manager.hook.ask() for _ in range(3)])
    assert _hook_calls(engine, steps=2) == 6
    assert manager.hook.ask() == [1]


# Reports.

RESULTS = (
    Result(check="L2/rms_norm/acme/one.float32", outcome="passed", numbers={"error": 1e-7}),
    Result(check="L2/rms_norm/acme/one.float16", outcome="not declared", reason="no"),
    Result(check="L2/linear/acme/one.float32", outcome="failed", reason="off"),
    Result(check="L2/linear/reference/one.float32", outcome="passed"),
    Result(check="L3/fast/case/window.decode", outcome="passed"),
    Result(check="L3/fast/idle", outcome="passed", seconds=0.25),
)
REPORT = Report(
    backend="acme", facts={"device": "one"}, complete=True, levels=(2, 3), results=RESULTS
)


def test_a_report_comes_back_as_it_was(tmp_path):
    path = tmp_path / "reports" / "acme.json"
    write_report(REPORT, path)
    assert read_report(path) == REPORT
    assert path.read_text().count("\n") > len(RESULTS), "one line a result"


@pytest.mark.parametrize("text", ["", "{}", '{"format": 99}', '{"format": 1}'])
def test_other_files_are_no_report(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match="--report FILE"):
        read_report(tmp_path / "x.json")


def test_the_matrix_names_who_passes():
    text = support_matrix([REPORT])
    assert "| L2 operations | 2 passed, 1 failed, 1 not declared |" in text
    assert "| L0 hygiene | not run |" in text
    assert "| `rms_norm` | acme |" in text
    assert "| `linear` | reference |" in text
    assert "| `window` | fast |" in text


def test_summary_counts_each_level():
    rows = summary_rows(RESULTS)
    assert rows[0] == ["L2", "operations", "2", "1", "1", "", ""]
    assert rows[1][:3] == ["L3", "attention", "2"]
