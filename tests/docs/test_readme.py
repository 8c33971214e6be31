# SPDX-License-Identifier: Apache-2.0
"""The first page is short, and its map is the tree."""

from __future__ import annotations

import re

from tests.docs.blocks import ROOT, blocks

README = ROOT / "README.md"


def drawn_tree() -> dict[str, list[str]]:
    """Top-level entry → entries drawn below it."""
    (tree,) = [b.text for b in blocks(README, "text") if b.text.startswith(".\n")]
    found: dict[str, list[str]] = {}
    for line in tree.splitlines()[1:]:
        match = re.match(r"^(│   |    )?(?:├──|└──) (\S+)", line)
        assert match, line
        if match[1]:
            found[list(found)[-1]].append(match[2])
        else:
            found[match[2]] = []
    return found


def tracked() -> set[str]:
    """Top-level entries that belong to the project."""
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    return {
        path.name + "/" * path.is_dir()
        for path in ROOT.iterdir()
        if path.name not in ignored and not path.name.startswith(".")
    } - {"shared/"}


def test_readme_is_at_most_150_lines():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_map_is_the_tree():
    tree = drawn_tree()
    assert set(tree) == tracked()
    for parent, children in tree.items():
        for child in children:
            assert (ROOT / parent / child).exists(), f"{parent}{child}"


def test_the_map_shows_every_package_of_the_core():
    packages = {p.parent.name + "/" for p in (ROOT / "core/bedplate").glob("*/__init__.py")}
    page = (ROOT / "core" / "README.md").read_text(encoding="utf-8")
    layers = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert packages <= {f"{name}/" for name in layers}
