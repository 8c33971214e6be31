# SPDX-License-Identifier: Apache-2.0
"""The pages of the documentation, their fenced blocks, headings and links."""

from __future__ import annotations

__all__ = ["PAGES", "ROOT", "Block", "anchors", "blocks", "links"]

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([
    *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/README.md"),
    *(path for shelf in ("core", "backends", "plugins", "benchmarks", "scripts")
      for path in ROOT.glob(f"{shelf}/**/README.md") if ".venv" not in path.parts),
])  # fmt: skip
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: where, which language, what."""

    page: Path
    line: int
    language: str
    text: str


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of one language, in order."""
    source = page.read_text(encoding="utf-8")
    return [
        Block(page, source.count("\n", 0, match.start()) + 2, language, match[2])
        for match in _FENCE.finditer(source)
        if match[1] == language
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """Targets of the links of a page."""
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """What a link into a page may name: its headings, as Git forges spell them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(plain.strip().replace(" ", "-"))
    return found
