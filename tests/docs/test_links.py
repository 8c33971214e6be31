# SPDX-License-Identifier: Apache-2.0
"""Links lead somewhere, and every page can be reached from the front page."""

from __future__ import annotations

import pytest
from tests.docs.blocks import PAGES, ROOT, anchors, links


def target(page, link):
    """(path, anchor) of a link inside the repository, or ``None`` for one that leaves it."""
    if "://" in link or link.startswith("mailto:"):
        return None
    path, _, anchor = link.partition("#")
    return (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    for link in links(page):
        found = target(page, link)
        if found is None:
            continue
        path, anchor = found
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
    assert broken == []


def test_every_page_of_the_docs_is_reachable():
    todo, seen = [ROOT / "docs" / "index.md"], set()
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md" or not page.is_file():
            continue
        seen.add(page)
        todo += [found[0] for link in links(page) if (found := target(page, link))]
    assert [p for p in (ROOT / "docs").rglob("*.md") if p not in seen] == []
