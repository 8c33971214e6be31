# SPDX-License-Identifier: Apache-2.0
"""``bedplate new-backend``: from an empty folder to a first token, without an edit."""

from __future__ import annotations

import re
import time

import pytest
from click.testing import CliRunner
from tests.architecture.tree import ROOT

from bedplate import template
from bedplate.cli.main import cli
from bedplate.errors import ConfigError

FILES = {
    "pyproject.toml", "README.md", ".gitignore", ".github/workflows/ci.yml",
    "bedplate_acme/__init__.py", "bedplate_acme/plugin.py", "bedplate_acme/py.typed",
    "tests/test_conformance.py",
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(cli, ["new-backend", *arguments])


def test_every_file_is_there_and_named_after_the_backend(run, tmp_path):
    assert run("acme_2").exit_code == 0
    folder = tmp_path / "bedplate-acme-2"
    texts = {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert set(texts) == {name.replace("acme", "acme_2") for name in FILES}
    whole = "\n".join(texts.values())
    assert re.findall(r"(?i)acme(?![-_]?2|2|_2)", whole) == []
    assert "class Acme2:" in whole
    assert "bedplate-acme-2" in whole
    compile(texts["bedplate_acme_2/plugin.py"], "plugin.py", "exec")


@pytest.mark.parametrize(
    ("name", "words"),
    [("cpu", "reserved for bedplate"), ("auto", "reserved"), ("npu", "reserved"),
     ("Acme", "not made of"), ("2d", "not made of"), ("a-b", "not made of")],
)  # fmt: skip
def test_a_name_that_cannot_be_is_refused(run, tmp_path, name, words):
    failure = run(name).exception
    assert isinstance(failure, ConfigError)
    assert words in str(failure)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    failure = run("acme", "--into", "mine").exception
    assert isinstance(failure, ConfigError)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


def test_the_template_is_formatted_and_fits_88_columns():
    for path, text in template.render("acme").items():
        assert not text or text.endswith("\n"), path
        if path.endswith(".py"):
            assert max(map(len, text.splitlines())) <= 88, path


@pytest.mark.slow
def test_from_an_empty_folder_to_a_token_and_the_kit(room, home_wheel, capsys):
    begin = time.perf_counter()
    room.install(home_wheel)
    room.bedplate("new-backend", "acme")
    package = room.folder / "bedplate-acme"
    room.install(package)
    installed = time.perf_counter()
    row = room.backends()["backend:acme"]
    assert (row["status"], row["distribution"]) == ("usable", "bedplate-acme")
    room.bedplate("doctor", "--backend", "acme")
    assert room.answer("acme")["text"].strip() == "12 + 30 = 42."
    answered = time.perf_counter()
    hidden = room.bedplate("backends", ACME_HIDDEN="1")
    assert "ACME_HIDDEN is set" in hidden
    room.run("-m", "pytest", "-q", folder=package)
    end = time.perf_counter()
    with capsys.disabled():
        print(
            f"\n{installed - begin:.0f} s to install, {answered - installed:.0f} s to a token, "
            f"{end - answered:.0f} s for the kit"
        )
    assert end - begin < 600


def test_the_command_is_documented():
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert "### `bedplate new-backend`" in page
