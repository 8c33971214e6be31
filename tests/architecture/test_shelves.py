# SPDX-License-Identifier: Apache-2.0
"""Backends and plugins all have one shape, and the door knows exactly those that are there."""

from __future__ import annotations

import os
import re
import tomllib
from importlib.metadata import entry_points

import pytest
from tests.architecture.tree import BACKENDS, KERNELS, PLUGINS, PYPROJECT, ROOT, folders

SHAPE = {"plugin", "runtime", "graph", "attention", "memory", "ops", "collectives"}
GROUPS = {"bedplate.backends", "bedplate.kernels", "bedplate.plugins"}


def modules_of(folder):
    package = folder / f"bedplate_{folder.name}"
    return {
        path.stem
        for path in package.iterdir()
        if (path.suffix == ".py" and path.stem != "__init__")
        or (path / "__init__.py").is_file()
    }


@pytest.mark.parametrize("folder", folders(BACKENDS), ids=lambda f: f.name)
def test_backends_have_the_same_file_names(folder):
    assert {"plugin", "runtime", "attention"} <= modules_of(folder)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    extra = modules_of(folder) - SHAPE
    unexplained = {
        name for name in extra if not re.search(rf"^\| `{name}(\.py|/)`", readme, re.M)
    }
    assert unexplained == set(), "a file of another name needs a row and a reason in the README"


@pytest.mark.parametrize("folder", folders(BACKENDS) + folders(PLUGINS), ids=lambda f: f.name)
def test_every_shelf_is_typed_and_has_a_readme(folder):
    assert (folder / "README.md").is_file()
    assert (folder / f"bedplate_{folder.name}" / "py.typed").is_file()


@pytest.mark.parametrize(
    "shelf", [ROOT / "core", KERNELS, BACKENDS, PLUGINS], ids=lambda f: f.name
)
def test_shelves_are_not_packages(shelf):
    assert not (shelf / "__init__.py").exists()
    assert (shelf / "README.md").is_file()


def test_entry_points_of_backends_are_the_folders():
    names = [folder.name for folder in folders(BACKENDS)]
    project = PYPROJECT["project"]
    expected = {name: f"bedplate_{name}.plugin:backend" for name in names}
    assert project["entry-points"] == {"bedplate.backends": expected}
    assert set(names) <= set(project["optional-dependencies"])
    build = PYPROJECT["tool"]["hatch"]["build"]
    assert build["dev-mode-dirs"] == [
        "core",
        "kernels",
        *(f"backends/{name}" for name in names),
    ]
    assert build["targets"]["wheel"]["packages"] == [
        "core/bedplate", "kernels/bedplate_triton",
        *(f"backends/{name}/bedplate_{name}" for name in names),
    ]  # fmt: skip


def test_the_installed_entry_points_are_those_of_the_project():
    installed = {
        (point.name, point.value)
        for point in entry_points(group="bedplate.backends")
        if point.dist is not None and point.dist.name == "bedplate"
    }
    declared = PYPROJECT["project"]["entry-points"]["bedplate.backends"]
    assert installed == set(declared.items())


@pytest.mark.parametrize("folder", folders(PLUGINS), ids=lambda f: f.name)
def test_a_plugin_is_a_distribution_of_its_own(folder):
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == f"bedplate-{folder.name}".replace("_", "-")
    ((group, points),) = project["entry-points"].items()
    assert group in GROUPS
    assert list(points) == [folder.name]
    assert points[folder.name].partition(":")[0] == f"bedplate_{folder.name}.plugin"


@pytest.mark.skipif("CI" not in os.environ, reason="needs what scripts/test installs")
@pytest.mark.parametrize("folder", folders(PLUGINS), ids=lambda f: f.name)
def test_where_everything_is_tested_plugins_are_installed(folder):
    installed = {point.name for group in GROUPS for point in entry_points(group=group)}
    assert folder.name in installed
