# SPDX-License-Identifier: Apache-2.0
"""The listing commands: text, JSON, exit status, and what they must not import."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from bedplate.cli import main as module
from bedplate.cli.main import COMMANDS, cli, main
from bedplate.cli.tables import format_table
from bedplate.contract import Candidate, Decision, ReportItem
from bedplate.errors import ConfigError, ModelNotFoundError

READY = ("backends", "doctor", "explain")


@pytest.fixture
def run(monkeypatch):
    for name in ("BEDPLATE_BACKEND", "BEDPLATE_PLUGINS", "BEDPLATE_CONFIG", "BEDPLATE_DEBUG"):
        monkeypatch.setenv(name, "")

    def go(*arguments):
        return CliRunner().invoke(cli, arguments)

    return go


def test_help_is_light_and_quick():
    code = (
        "import sys\nfrom bedplate.cli.main import cli\n"
        "try: cli(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'bedplate.registry', 'pluggy'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    times = []
    for _ in range(3):
        before = _processor_seconds()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        times.append(_processor_seconds() - before)
        assert done.returncode == 0, done.stderr
    assert all(name in done.stdout.decode() for name in COMMANDS)
    assert min(times) < 0.150


def _processor_seconds():
    """Of ended children; the wall clock would measure our neighbours on a busy machine."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("name", READY)
def test_help_of_commands_has_examples_and_json_shape(run, name):
    text = run(name, "--help").output
    assert "Examples:\n" in text
    assert "JSON: {" in text
    assert run(name, "--nonsense").exit_code == 2


def test_unknown_command(run):
    assert run("brew").exit_code == 2


def test_backends(run):
    text = run("backends").output
    assert text.startswith("name")
    assert any(line.split()[:2] == ["cpu", "backend"] for line in text.splitlines())
    data = json.loads(run("backends", "--json").output)
    assert set(data) == {"api", "plugins", "diagnoses"}
    rows = {row["name"]: row for row in data["plugins"] if row["kind"] == "backend"}
    assert rows["cpu"]["status"] == "usable"
    assert rows["cpu"]["devices"][0]["index"] == 0
    absent = [row for row in rows.values() if row["status"] == "absent"]
    assert all(row["code"] == "HW004" for row in absent)
    assert {frozenset(row) for row in rows.values()} == {
        frozenset({"name", "kind", "distribution", "version", "api", "status", "score", "code",
                   "reason", "summary", "devices"})
    }  # fmt: skip


def test_doctor(run):
    done = run("doctor", "--backend", "cpu", "--json")
    data = json.loads(done.output)
    assert data["ok"]
    assert done.exit_code == 0
    items = {(item["section"], item["name"]): item for item in data["items"]}
    assert items["environment", "torch"]["value"]
    assert ("plugins", "backend:cpu") in items
    assert any(section == "cpu" for section, _name in items)
    assert run("doctor", "--backend", "cpu").output.startswith("section")


def test_doctor_demands_the_named_backend(run):
    done = run("doctor", "--backend", "cpux")
    assert done.exit_code == 1
    assert "HW001" in done.output
    assert "Did you mean 'cpu'?" in done.output


def test_doctor_shows_variables_that_nobody_knows(run, monkeypatch):
    monkeypatch.setenv("BEDPLATE_BAKCEND", "cpu")
    assert "BEDPLATE_BAKCEND" in run("doctor", "--backend", "cpu").output


def test_doctor_survives_a_report_that_raises_and_a_missing_package(run, monkeypatch):
    from bedplate.cli import doctor
    from bedplate.registry import survey

    found = survey()

    def broken(*_args, **_kwargs):
        raise OSError("no driver")

    monkeypatch.setattr(found.hooks, "call", broken)
    installed = {**found.installed}
    del installed["torch"]
    object.__setattr__(found, "installed", installed)
    monkeypatch.setattr(doctor, "survey", lambda: found)
    done = run("doctor", "--backend", "cpu", "--json")
    bad = {i["name"] for i in json.loads(done.output)["items"] if i["status"] == "bad"}
    assert bad == {"bedplate_environment_report", "torch"}
    assert done.exit_code == 1


def test_doctor_lists_diagnoses(run, monkeypatch):
    monkeypatch.setenv("BEDPLATE_PLUGINS", "no_such_plugin")
    done = run("doctor", "--json")
    assert any(item["value"] == "HW033" for item in json.loads(done.output)["items"])
    assert any(
        item["code"] == "HW033"
        for item in json.loads(run("backends", "--json").output)["diagnoses"]
    )


def test_explain_backend(run, monkeypatch):
    assert run("explain", "--backend", "cpu").output.startswith("backend: cpu\n")
    monkeypatch.setenv("BEDPLATE_BACKEND", "cpu")
    data = json.loads(run("explain", "--json").output)
    (decision,) = data["decisions"]
    assert data["error"] is None
    assert (decision["point"], decision["chosen"]) == ("backend", "cpu")
    assert decision["detail"]["source"] == "BEDPLATE_BACKEND"
    assert all(set(c) == {"name", "verdict", "reason"} for c in decision["candidates"])


def test_explain_prints_a_refused_start_too(run):
    done = run("explain", "--backend", "cpux", "--json")
    assert json.loads(done.stdout)["error"]["code"] == "HW001"
    assert done.exception.code == "HW001"


@pytest.mark.parametrize("error", [None, ModelNotFoundError("no such folder")])
def test_explain_model_starts_it_and_shuts_down(run, monkeypatch, error):
    calls = []

    def start(config, *, decisions):
        calls.append(config.model)
        chosen = Candidate(name="a", verdict="chosen", reason="r")
        decisions.record(Decision(point="dtype", chosen="a", candidates=(chosen,)))
        if error is not None:
            raise error
        return SimpleNamespace(shutdown=lambda: calls.append("shutdown"))

    monkeypatch.setitem(sys.modules, "bedplate.runner.startup", SimpleNamespace(start=start))
    done = run("explain", "--model", "/m")
    assert done.stdout.startswith("dtype: a\n")
    assert done.exception is error
    assert calls == (["/m", "shutdown"] if error is None else ["/m"])


def test_safe_mode_reaches_the_registry(run, monkeypatch):
    seen = []
    monkeypatch.setattr(module.env, "set_plugins", seen.append)
    assert run("--no-plugins", "backends").exit_code == 0
    assert seen == ["none"]


def as_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bedplate", *arguments])
    main()


def test_errors_are_one_message_and_a_status(run, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        as_script(monkeypatch, "explain", "--backend", "cpu,,")
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("bedplate: Backend 'cpu,,' (from --backend)")
    assert "Traceback" not in error


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("BEDPLATE_DEBUG", "1")
    with pytest.raises(ConfigError):
        as_script(monkeypatch, "explain", "--backend", "cpu,,")


def test_wrong_debug_does_not_hide_the_error(run, monkeypatch, capsys):
    monkeypatch.setenv("BEDPLATE_DEBUG", "perhaps")
    with pytest.raises(SystemExit):
        as_script(monkeypatch, "explain", "--backend", "cpu,,")
    assert "cpu,," in capsys.readouterr().err


def test_table():
    text = format_table(["a", "long"], [["xyz", "1"], ["", "2"]])
    assert text == "a    long\nxyz  1\n     2"
    assert format_table(["a", "b"], []) == "a  b"


def test_report_items_are_checked(run, monkeypatch):
    from bedplate.cli import doctor
    from bedplate.registry import survey

    found = survey()
    answer = ["no item", ReportItem(name="n", value="v")]
    monkeypatch.setattr(found.hooks, "call", lambda *_a, **_k: answer)
    record = found.backend("cpu")
    assert doctor._report(record, found) == answer[1:]
