# SPDX-License-Identifier: Apache-2.0
"""What only the syntax tree shows: environment reads, licence lines, examples, sizes."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest
from tests.architecture.tree import PYPROJECT, ROOT, core_files, package_files, parse

if TYPE_CHECKING:
    from pathlib import Path

import bedplate
import bedplate.contract

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 800, 120
MARKER = "# Long because"
"""A line with this and a reason excuses a file or function."""


def environment_reads(tree: ast.Module) -> list[int]:
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.ImportFrom) and names & {alias.name for alias in node.names})
    ]


def private_uses(tree: ast.Module) -> list[str]:
    """Imports of ours that are not public, and underscored attributes."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("bedplate.")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bedplate"):
            public = {"bedplate": bedplate, "bedplate.contract": bedplate.contract}
            offered = getattr(public.get(node.module or ""), "__all__", ())
            found += [f"{node.module}.{a.name}" for a in node.names if a.name not in offered]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            found.append(node.attr)
    return found


def lengths(paths: list[Path]) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """(lines, name) of files and of functions, longest first; excused ones left out."""
    files, functions = [], []
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines()
        name = str(path.relative_to(ROOT))
        if not any(line.startswith(MARKER) for line in lines):
            files.append((len(lines), name))
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = lines[node.lineno - 1 : node.end_lineno]
                if not any(MARKER in line for line in body):
                    functions.append((len(body), f"{name}:{node.lineno} {node.name}"))
    return sorted(files, reverse=True), sorted(functions, reverse=True)


def test_only_env_reads_the_environment():
    readers = [path.name for path in core_files() if environment_reads(parse(path))]
    assert readers == ["env.py"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_examples_use_public_names_only(path):
    assert private_uses(parse(path)) == []


@pytest.mark.parametrize(
    "source",
    ["import bedplate.runner", "from bedplate.engine.engine import Engine", "engine._started",
     "from bedplate import registry"],
)  # fmt: skip
def test_the_search_sees_private_uses(source):
    assert private_uses(ast.parse(source))


def test_examples_are_three():
    assert [path.name for path in EXAMPLES] == [
        "01_generate.py", "02_stream.py", "03_look_inside_a_batch.py"
    ]  # fmt: skip


def test_every_file_begins_with_its_licence():
    folders = ("core", "kernels", "backends", "plugins", "tests", "examples", "scripts",
               "benchmarks")  # fmt: skip
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    without = [
        str(path.relative_to(ROOT))
        for path in paths
        if "SPDX-License-Identifier: Apache-2.0" not in path.read_text(encoding="utf-8")[:120]
    ]
    assert without == []


def test_the_library_does_not_print():
    rules = PYPROJECT["tool"]["ruff"]["lint"]
    assert "T20" in rules["select"]
    allowed = {path for path, codes in rules["per-file-ignores"].items() if "T20" in codes}
    assert {path for path in allowed if path.startswith("core/")} == {"core/bedplate/cli/**"}


def test_size_report():
    files, functions = lengths(package_files())
    for lines, name in [*files[:10], *functions[:10]]:
        print(f"{lines:5d}  {name}")
    assert files[0][0] <= LONGEST_FILE, files[0]
    assert functions[0][0] <= LONGEST_FUNCTION, functions[0]
