# SPDX-License-Identifier: Apache-2.0
"""Arrows only point downwards. The contracts themselves are in ``pyproject.toml``."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.architecture.tree import BACKENDS, PLUGINS, PYPROJECT, ROOT, folders

SETTINGS = PYPROJECT["tool"]["importlinter"]
CONTRACTS = {contract["name"]: contract for contract in SETTINGS["contracts"]}
OPEN_TO_BACKENDS = {
    "attention", "batch", "contract", "errors", "graph", "logs", "memory", "reference",
}  # fmt: skip
OPEN_TO_KERNELS = {"batch", "contract", "errors", "reference"}
OPEN_TO_PLUGINS = {"contract", "errors", "logs"}


def core_packages() -> set[str]:
    return {
        path.stem
        for path in (ROOT / "core" / "bedplate").iterdir()
        if (path.suffix == ".py" and not path.stem.startswith("__"))
        or (path / "__init__.py").is_file()
    }


def closed_to(kind: str) -> set[str]:
    (contract,) = (c for name, c in CONTRACTS.items() if name.startswith(f"{kind} see"))
    forbidden = contract["forbidden_modules"]
    return {
        name.removeprefix("bedplate.") for name in forbidden if name.startswith("bedplate.")
    }


def test_every_contract_is_kept():
    # A process of its own, with the plugins' folders: they may not be installed here.
    paths = [str(folder) for folder in folders(PLUGINS)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()",
         "--no-cache"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(CONTRACTS)} kept, 0 broken" in done.stdout


def test_every_package_is_looked_at():
    found = {f"bedplate_{folder.name}" for folder in folders(BACKENDS) + folders(PLUGINS)}
    assert set(SETTINGS["root_packages"]) == found | {"bedplate", "bedplate_triton"}
    independent = CONTRACTS["Backends and plugins are independent of each other"]
    assert set(independent["modules"]) == found
    core = CONTRACTS["The core knows no backend, no plugin and no vendor library"]
    assert found | {"bedplate_triton"} <= set(core["forbidden_modules"])


def test_a_new_core_package_is_closed_to_outsiders_unless_opened():
    assert closed_to("Backends") == core_packages() - OPEN_TO_BACKENDS
    assert closed_to("Kernels") == core_packages() - OPEN_TO_KERNELS
    assert closed_to("Plugins") == core_packages() - OPEN_TO_PLUGINS
