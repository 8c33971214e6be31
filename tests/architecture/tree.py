# SPDX-License-Identifier: Apache-2.0
"""Where things are in the checkout, and its Python files as syntax trees."""

from __future__ import annotations

__all__ = [
    "BACKENDS",
    "KERNELS",
    "PLUGINS",
    "PYPROJECT",
    "ROOT",
    "core_files",
    "folders",
    "kernel_files",
    "module_name",
    "package_files",
    "parse",
]

import ast
import tomllib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ROOT / "backends"
KERNELS = ROOT / "kernels"
PLUGINS = ROOT / "plugins"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def folders(parent: Path) -> list[Path]:
    """Folders directly in ``parent`` that hold a Python package of their own."""
    return sorted(
        path
        for path in parent.iterdir()
        if (path / f"bedplate_{path.name}" / "__init__.py").is_file()
    )


def core_files() -> list[Path]:
    """Every module of the core."""
    return sorted((ROOT / "core").rglob("*.py"))


def kernel_files() -> list[Path]:
    """Every module of the kernels; no tests."""
    return sorted((KERNELS / "bedplate_triton").rglob("*.py"))


def package_files() -> list[Path]:
    """Every module that is shipped: core, kernels, backends, plugins; no tests."""
    shelves = [*folders(BACKENDS), *folders(PLUGINS)]
    files = [*core_files(), *kernel_files()]
    for shelf in shelves:
        files += sorted((shelf / f"bedplate_{shelf.name}").rglob("*.py"))
    return files


def module_name(path: Path) -> str:
    """Dotted name of a file of ``package_files``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1 if parts[0] in ("core", "kernels") else 2 :]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
