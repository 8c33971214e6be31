# SPDX-License-Identifier: Apache-2.0
"""Every module imports first and alone, without a warning: no hidden order, no cycle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.architecture.tree import PLUGINS, folders, module_name, package_files


def import_each(modules: list[str], *paths: str) -> dict[str, str]:
    """Module → traceback, for those that fail."""
    server = Path(__file__).with_name("import_server.py")
    done = subprocess.run(
        [sys.executable, str(server), *modules],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {name: error for name, error in json.loads(done.stdout).items() if error}


def test_every_module_imports_alone():
    modules = [module_name(path) for path in package_files()]
    assert len(modules) > 100
    errors = import_each(modules, *(str(folder) for folder in folders(PLUGINS)))
    assert errors == {}, "\n".join(errors.values())


def test_a_cycle_and_a_warning_are_seen(tmp_path):
    (tmp_path / "first.py").write_text("import second\nname = second.name")
    (tmp_path / "second.py").write_text("from first import name")
    (tmp_path / "noisy.py").write_text("import warnings; warnings.warn('old')")
    errors = import_each(["first", "second", "noisy", "json"], str(tmp_path))
    assert sorted(errors) == ["first", "noisy", "second"]
