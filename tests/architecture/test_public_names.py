# SPDX-License-Identifier: Apache-2.0
"""``__all__`` says what a module offers: sorted, resolvable, and nothing used is missing."""

from __future__ import annotations

import ast
from importlib import import_module
from typing import TYPE_CHECKING

import pytest
from tests.architecture.tree import ROOT, core_files, module_name, package_files, parse

if TYPE_CHECKING:
    from pathlib import Path

import bedplate

EXPORTING = [path for path in package_files() if ROOT / "plugins" not in path.parents]
"""A plugin's module is what its entry point offers; nobody imports names from it."""


def declared(path: Path) -> list[str] | None:
    for node in parse(path).body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == [
            "__all__"
        ]:
            return ast.literal_eval(node.value)
    return None


def natural(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, as the linter sorts them."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def public_definitions(path: Path) -> list[str]:
    return [
        node.name
        for node in parse(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]


def bound(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@pytest.mark.parametrize("path", EXPORTING, ids=module_name)
def test_all_is_there_sorted_and_bound(path):
    names = declared(path)
    if names is None:
        assert public_definitions(path) == [], "public names without __all__"
        return
    assert names == sorted(set(names), key=natural)
    assert set(names) <= bound(path)


def test_names_that_other_modules_import_are_exported():
    modules = {module_name(path): path for path in core_files()}
    missing = set()
    for user in package_files():
        for node in ast.walk(parse(user)):
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                offered = declared(modules[node.module]) or []
                missing |= {
                    f"{node.module}.{alias.name} (used by {user.relative_to(ROOT)})"
                    for alias in node.names
                    if alias.name not in offered
                    and f"{node.module}.{alias.name}" not in modules
                }
    assert sorted(missing) == []


@pytest.mark.parametrize("module", ["bedplate", "bedplate.contract"])
def test_public_names_resolve_and_are_documented(module):
    package = import_module(module)
    for name in package.__all__:
        thing = getattr(package, name)
        assert not callable(thing) or thing.__doc__, f"{module}.{name} has no docstring"


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Motor'"):
        bedplate.Motor  # noqa: B018
    assert dir(bedplate) == bedplate.__all__
