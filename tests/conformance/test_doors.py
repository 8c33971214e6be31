# SPDX-License-Identifier: Apache-2.0
"""The three doors, as a stranger uses them: each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bedplate.cli import conformance
from bedplate.cli.main import cli
from bedplate.conformance.cases.recorded import recorded_cases
from bedplate.conformance.examine import all_checks, examine
from bedplate.conformance.subject import Subject
from bedplate.errors import ConfigError
from bedplate.runner.op_trace import read_trace
from bedplate.testing.fake_plugins import fake_plugins

ROOT = Path(__file__).resolve().parents[2]
FEW = "L2/rms_norm/*/no_weight.*"


def run(*words, cwd, path=(), **environment):
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=cwd, capture_output=True, text=True, check=False,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([*path, *filter(None, sys.path)])}
        | environment,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def conform(*options, cwd, **more):
    return run("bedplate", "conformance", *options, cwd=cwd, **more)


def test_the_command_writes_a_report_whatever_the_folder_holds(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text("raise SystemExit('not asked for')")
    options = ("--backend", "cpu", "--level", "2", "--only", FEW, "--report", "out.json")
    status, text = conform(*options, cwd=tmp_path, BEDPLATE_PLUGINS="none")
    assert status == 0, text
    assert "L2     operations" in text
    data = json.loads((tmp_path / "out.json").read_text())
    assert (data["backend"], data["levels"], data["complete"]) == ("cpu", [2], False)
    assert data["counts"]["L2"] == {"passed": 6}
    assert data["facts"]["distribution"].startswith("bedplate ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--backend", "nope"), "HW001"),
        pytest.param(("--backend", "auto"), "examines one backend", marks=pytest.mark.slow),
        pytest.param(
            ("--backend", "cpu", "--level", "9"), "levels are 0 to 8", marks=pytest.mark.slow
        ),
    ],
)
def test_what_cannot_be_examined_is_refused_before_any_check(tmp_path, options, words):
    status, text = conform(*options, cwd=tmp_path)
    assert status == 4
    assert words in text
    assert "Traceback" not in text


def mutant_on_disk(fakes, name):
    fakes.distribution(
        "bedplate-mutant",
        entries=f"[bedplate.backends]\nmutant = tests.conformance.mutants:{name}\n",
    )
    return [*fakes.path, str(ROOT)]


@pytest.mark.slow
def test_a_failure_ends_with_status_1_and_its_reproducer(tmp_path):
    with fake_plugins() as fakes:
        path = mutant_on_disk(fakes, "linear_without_bias")
        options = ("--backend", "mutant", "--level", "2", "--only", "L2/linear/mutant/few*")
        status, text = conform(*options, cwd=tmp_path, path=path)
    assert status == 1, text
    line = "bedplate conformance --backend mutant --only 'L2/linear/mutant/few.float32'"
    assert line in text


@pytest.mark.slow
@pytest.mark.parametrize(("strict", "status"), [(False, 0), (True, 1)])
def test_a_surplus_fails_only_when_asked(tmp_path, strict, status):
    with fake_plugins() as fakes:
        path = mutant_on_disk(fakes, "refuses_what_it_can")
        options = ["--backend", "mutant", "--level", "3", "--only", "L3/*/kind/window"]
        got, text = conform(*options, *(["--strict"] * strict), cwd=tmp_path, path=path)
    assert (got, "surplus: L3/native/kind/window" in text) == (status, True), text


def test_a_process_that_is_brought_down_names_the_check(tmp_path):
    with fake_plugins() as fakes:
        path = mutant_on_disk(fakes, "aborts")
        options = ("--backend", "mutant", "--level", "2", "--only", "L2/linear/mutant/*")
        status, text = conform(*options, cwd=tmp_path, path=path)
    assert status == 3
    assert "ended by signal 6 in L2/linear/mutant/" in text


VENDOR = "from bedplate.conformance.suite import *\n"


@pytest.mark.parametrize(
    ("module", "options", "status", "words"),
    [
        (VENDOR + "BACKEND = 'cpu'\nLEVEL = '2'\n", ("-k", "no_weight"), 0, "passed"),
        pytest.param(
            VENDOR, (), 2, "examines the backend that you name", marks=pytest.mark.slow
        ),
        pytest.param(
            VENDOR,
            ("-p", "bedplate.conformance.plugin", "--backend", "cpu", "--only", FEW, "-v"),
            0,
            "PASSED",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one line", "no name", "with the plugin"],
)
def test_star_import_in_a_vendors_own_tests(tmp_path, module, options, status, words):
    (tmp_path / "test_conformance.py").write_text(module)
    got, text = run("pytest", "-c", os.devnull, "-W", "error", *options, ".", cwd=tmp_path)
    assert got == status, text
    assert words in text


def test_missing_tools_are_named_with_the_extra(monkeypatch):
    monkeypatch.setattr(conformance, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli, ["conformance", "--backend", "cpu"])
    assert isinstance(result.exception, ConfigError)
    assert "pytest and hypothesis" in result.exception.message
    assert "pip install 'bedplate[conformance]'" in result.exception.message


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("support", "rms_norm/weight_after_cast.odd.float32\tcpu\tyes\tone fused call"),
        ("list", "L8/table/HW045/hook_after_sealing"),
        ("time", "rms_norm/weight_after_cast.many.float32\tcpu\t"),
    ],
)
def test_other_uses_of_the_cases(use, words, capfd):
    from bedplate.conformance.uses import main

    assert main([use, "cpu", "8"]) == 0
    assert words in capfd.readouterr().out


def test_a_recorded_run_becomes_cases_that_pass(tmp_path):
    file = tmp_path / "ops.jsonl"
    options = ["trace-ops", "--backend", "cpu", "--dtype", "float32", "--out", str(file)]
    result = CliRunner().invoke(cli, options, catch_exceptions=False)
    assert result.exit_code == 0
    seen = {entry["op"] for entry in read_trace(file)}
    assert seen >= {"linear", "norm_linear", "add_norm", "qk_norm_rope_write"}
    assert len(recorded_cases(file)) == len(read_trace(file)) > 20
    subject = Subject("cpu")
    subject.ops_trace = file
    try:
        results = [examine(c, subject) for c in all_checks(subject, [2]) if "recorded" in c.id]
    finally:
        subject.close()
    assert {r.outcome for r in results} == {"passed"}, [r for r in results if r.reason]
    assert len(results) >= len(read_trace(file))


@pytest.mark.parametrize("text", ["", "{}", '{"format": 7}'])
def test_other_files_are_no_trace(tmp_path, text):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ConfigError, match="trace-ops"):
        read_trace(tmp_path / "x")
