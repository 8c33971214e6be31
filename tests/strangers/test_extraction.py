# SPDX-License-Identifier: Apache-2.0
"""An in-tree backend, copied out and renamed, is a stranger's backend that works as well."""

from __future__ import annotations

import json
import shutil
import tomllib

import pytest
from tests.architecture.tree import BACKENDS, ROOT, folders
from tests.strangers.room import Room

from bedplate import template

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]
LEVELS = "0-4,8"
"""What a name or a place could break.  The answer is a whole model's; recorded passes are
compiled anew for a new name, for a minute, and are examined in the tree."""


def extract(name, into):
    """A distribution of its own, with the template's pyproject; no line is edited by hand."""
    new = f"copied_{name}"
    package = into / f"bedplate_{new}"
    shutil.copytree(
        BACKENDS / name / f"bedplate_{name}", package,
        ignore=shutil.ignore_patterns("__pycache__"),
    )  # fmt: skip
    for path in package.rglob("*.py"):
        text = path.read_text().replace(f"bedplate_{name}", f"bedplate_{new}")
        path.write_text(
            text.replace(f'"{name}"', f'"{new}"') if path.stem == "plugin" else text
        )
    for path in ("pyproject.toml", "README.md", "tests/test_conformance.py"):
        (into / path).parent.mkdir(exist_ok=True)
        (into / path).write_text(template.render(new)[path])
    if EXTRAS.get(name):  # what the backend needs goes with it, under the new name
        project = into / "pyproject.toml"
        head = "[project.optional-dependencies]\n"
        needs = f"{head}{new} = {json.dumps(EXTRAS[name])}\n"
        assert project.read_text().count(head) == 1
        project.write_text(project.read_text().replace(head, needs))
    return new


def same_but_for_its_name(copy, original):
    ours = ("name", "distribution", "version", "reason")
    return {k: v for k, v in copy.items() if k not in ours} == {
        k: v for k, v in original.items() if k not in ours
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory, home_wheel):
    """One room for all copies: they have names of their own."""
    room = Room(tmp_path_factory.mktemp("room"))
    room.install(home_wheel)
    return room


@pytest.mark.slow
@pytest.mark.parametrize("folder", folders(BACKENDS), ids=lambda folder: folder.name)
def test_a_copied_backend_installs_and_passes(home, folder):
    package = home.folder / folder.name
    package.mkdir()
    name = extract(folder.name, package)
    home.install(package)
    rows = home.backends()
    copy, original = rows[f"backend:{name}"], rows[f"backend:{folder.name}"]
    assert copy["distribution"] == f"bedplate-{name.replace('_', '-')}"
    assert same_but_for_its_name(copy, original), (copy, original)
    if copy["status"] == "usable":
        assert home.answer(name)["text"].strip() == "12 + 30 = 42."
        home.run("-m", "pytest", "-q", "--level", LEVELS, folder=package)
    else:
        assert copy["reason"] == original["reason"]
        assert copy["code"] in home.failure("generate", "--backend", name, "-p", "Hello")
        assert copy["code"] in home.failure("conformance", "--backend", name)
