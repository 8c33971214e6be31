# SPDX-License-Identifier: Apache-2.0
"""Stage 2: plugins that are wrong in every way we know, beside one that is right."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bedplate.contract import API_VERSION
from bedplate.registry import inspect as stage


@pytest.fixture
def neighbour(fakes):
    """A good backend whose record must never suffer."""
    fakes.backend("zgood")
    return fakes


def only(survey, name):
    assert survey.backend("zgood").status == "loaded"
    return survey.backend(name)


def code_of(record):
    return record.error.code if record.error else None


def test_good_backend_is_loaded(neighbour):
    survey = neighbour.inspected()
    record = survey.backend("zgood")
    assert (record.status, record.error, record.warnings) == ("loaded", None, ())
    assert record.manifest.name == "zgood"
    assert survey.hooks.implements("backend:zgood", "bedplate_probe")
    assert not survey.hooks.implements("backend:zgood", "bedplate_compile")


@pytest.mark.parametrize(
    "code", ["import does_not_exist", "raise OSError('libfoo.so.1')", "raise SystemExit(3)",
             "x = ", "nothing = 1"],
)  # fmt: skip
def test_raising_at_import(neighbour, code):  # HW040
    neighbour.backend("boom", code=f"def deep():\n    {code}\ndeep()\n"
                      if "raise" in code else code)  # fmt: skip
    record = only(neighbour.inspected(), "boom")
    assert (record.status, code_of(record)) == ("failed", "HW040")
    assert "fake_boom" in record.error.message
    assert record.error.__cause__ is not None
    if "raise" in code:
        assert "in deep" in record.error.message


@pytest.mark.parametrize("when", ["import", "manifest"])
def test_binary_mismatch(neighbour, when):  # HW021
    line = "raise ImportError('x.so: undefined symbol: _ZN3c10')"
    if when == "import":
        neighbour.backend("linked", code=line)
    else:
        code = f"class B:\n    def bedplate_manifest(self):\n        {line}\nbackend = B()\n"
        neighbour.backend("linked", code=code)
    record = only(neighbour.inspected(), "linked")
    assert (record.status, code_of(record)) == ("failed", "HW021")


@pytest.mark.parametrize(
    ("needs", "older", "command"),
    [
        ((API_VERSION[0], API_VERSION[1] + 1), "bedplate", "pip install -U bedplate`"),
        ((API_VERSION[0] + 1, 0), "bedplate", "pip install -U bedplate`"),
        ((API_VERSION[0] - 1, 3), "the plugin", "pip install -U bedplate-old`"),
    ],
)
def test_api_mismatch_names_the_older_side(neighbour, needs, older, command):  # HW020
    neighbour.backend(
        "old", manifest=f"api=ApiRange(needs={needs})",
        extra="@hookimpl\ndef bedplate_from_the_future(self): ...",
    )  # fmt: skip
    record = only(neighbour.inspected(), "old")
    assert (record.status, code_of(record)) == ("refused", "HW020")
    assert f"older side is {older}" in record.error.message
    assert command in record.error.message


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("backend = object()", "no bedplate_manifest"),
        ("backend = None", "no bedplate_manifest"),
        ("class backend: ...", "is a class"),
        ("class B:\n    def bedplate_manifest(self): return {}\nbackend = B()", "gave dict"),
    ],
)
def test_not_a_plugin(neighbour, code, problem):  # HW035
    neighbour.backend("odd", code=code)
    record = only(neighbour.inspected(), "odd")
    assert code_of(record) == "HW035"
    assert problem in record.error.message


def test_manifest_that_raises(neighbour):  # HW041
    neighbour.backend(
        "odd", code="class B:\n    def bedplate_manifest(self): 1/0\nbackend = B()"
    )
    record = only(neighbour.inspected(), "odd")
    assert (record.status, code_of(record)) == ("failed", "HW041")
    assert "ZeroDivisionError" in record.error.message


def test_all_manifest_problems_are_listed(neighbour):  # HW035
    neighbour.backend("odd", manifest="kind='plugin', requires=('not a req!',)")
    source = neighbour.root / "fake_odd.py"
    source.write_text(source.read_text().replace('name="odd"', 'name="even"'))
    record = only(neighbour.inspected(), "odd")
    assert code_of(record) == "HW035"
    for part in ("name 'even'", "kind 'plugin'", "'not a req!'"):
        assert part in record.error.message


@pytest.mark.parametrize(
    ("hook", "problem"),
    [
        ("@hookimpl\ndef bedplate_activat(self): ...", "Did you mean 'bedplate_activate'?"),
        ("def bedplate_compile(self, request): ...", "not marked with hookimpl"),
        ("@hookimpl(wrapper=True)\ndef bedplate_compile(self): yield", "is a wrapper"),
        ("@hookimpl\ndef bedplate_compile(self, reqest): ...", "wants reqest"),
        ("@hookimpl\ndef bedplate_compile(self, *, extra): ...", "wants extra"),
        ("bedplate_x = property(lambda self: 1 / 0)", "division by zero"),
    ],
)
def test_hooks_that_cannot_be_registered(neighbour, hook, problem):  # HW036
    neighbour.backend("typo", extra=hook)
    survey = neighbour.inspected()
    record = only(survey, "typo")
    assert (record.status, code_of(record)) == ("refused", "HW036")
    assert problem in record.error.message
    assert "typo" in record.error.message
    assert not survey.hooks.manager.has_plugin("backend:typo")


def test_optional_hook_of_a_newer_core_is_fine(neighbour):
    neighbour.backend(
        "new", extra="@hookimpl(optionalhook=True)\ndef bedplate_from_the_future(self): ..."
    )
    assert only(neighbour.inspected(), "new").status == "loaded"


def test_backend_without_its_required_hooks(neighbour):  # HW035
    neighbour.backend(
        "half",
        code="from bedplate.contract import *\n"
        "class B:\n    @hookimpl\n    def bedplate_manifest(self):\n"
        "        return BackendManifest(name='half')\nbackend = B()",
    )
    survey = neighbour.inspected()
    record = only(survey, "half")
    assert code_of(record) == "HW035"
    for hook in stage.REQUIRED_OF_BACKENDS:
        assert hook in record.error.message
    assert not survey.hooks.manager.has_plugin("backend:half")


def test_requirements_of_the_extra_and_the_manifest(neighbour):  # HW002
    neighbour.distribution("present", version="3.1")
    neighbour.backend(
        "needy",
        manifest="requires=('present>=2', 'absent-b', 'nope; python_version < \"3\"')",
        requires=(
            "base-lib", "present>=3.3; extra == 'needy'", "absent.a; extra == 'needy'",
            "other; extra == 'test'", "%%%; extra == 'needy'", "present; extra == 'needy'",
        ),
    )  # fmt: skip
    record = only(neighbour.inspected(), "needy")
    assert (record.status, code_of(record), record.usable) == ("loaded", "HW002", False)
    assert record.error.missing == (
        "present>=3.3 (have 3.1), absent.a (missing), absent-b (missing)"
    )
    assert "pip install 'bedplate-needy[needy]'" in record.error.message


def test_requirements_without_an_extra_name_the_packages(neighbour):  # HW002
    neighbour.backend("needy", manifest="requires=('absent>=1',)")
    record = only(neighbour.inspected(), "needy")
    assert "`pip install 'absent>=1'`" in record.error.message


def test_heavy_import_is_a_warning(neighbour, monkeypatch):  # HW042
    monkeypatch.setattr(stage, "HEAVY", "fake_heavy")
    monkeypatch.setattr(stage, "SLOW_IMPORT_S", 0.0)
    (neighbour.root / "fake_heavy.py").write_text("")
    neighbour.backend("fat")
    source = neighbour.root / "fake_fat.py"
    source.write_text("import fake_heavy\n" + source.read_text())
    survey = neighbour.inspected()
    record = only(survey, "fat")
    assert record.status == "loaded"
    (warning,) = record.warnings
    assert warning.code == "HW042"
    assert "imported fake_heavy and took" in warning.message
    assert [d.severity for d in survey.diagnoses if d.plugin == "fat"] == ["warn"]


def test_refused_plugins_are_not_imported(neighbour):
    neighbour.home("[bedplate.backends]\nfake = m:x", extras=("stolen",))
    neighbour.backend("stolen", distribution="thief")
    neighbour.inspected()
    assert "fake_stolen" not in sys.modules


def test_inspecting_does_not_import_torch(tmp_path):
    code = """
import sys
from bedplate.registry import survey
survey()
sys.exit("torch" in sys.modules or "transformers" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
