# SPDX-License-Identifier: Apache-2.0
"""Plain text of the Python documentation, taken from the Debian package python3.11-doc.

``apt-get install python3.11-doc`` puts the pages under ``HTML_ROOT`` (PSF-2.0, examples 0BSD).
The text is not kept in this repository; this writes it as one compressed file::

    python -m scripts.demo_model.docs_text .carry/docs.txt.xz
"""

from __future__ import annotations

import lzma
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

__all__ = ["HTML_ROOT", "SEPARATOR", "page_text", "read_docs", "write_docs"]

HTML_ROOT = Path("/usr/share/doc/python3.11/html")
SEPARATOR = "\x00"
_FOLDERS = ("tutorial", "library", "howto", "reference", "faq", "using", "installing", "c-api")
_BLOCKS = frozenset({"p", "h1", "h2", "h3", "h4", "pre", "li", "dt", "dd", "tr", "div", "ul"})


class _Text(HTMLParser):
    """Collects text; blocks start lines, ``pre`` keeps its white space."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._verbatim = 0
        self._in_header_link = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._verbatim += tag == "pre"
        if tag == "a":
            self._in_header_link = ("class", "headerlink") in attrs
        if tag in _BLOCKS:
            self.parts.append("\n\n" if tag[0] in "hp" else "\n")

    def handle_endtag(self, tag: str) -> None:
        self._verbatim -= tag == "pre"
        if tag == "a":
            self._in_header_link = False

    def handle_data(self, data: str) -> None:
        if not self._in_header_link:
            self.parts.append(data if self._verbatim else re.sub(r"\s+", " ", data))


def page_text(html: str) -> str:
    """The readable text of one page; at most one empty line in a row."""
    parser = _Text()
    parser.feed(html.partition('role="main">')[2].partition('<div class="sphinxsidebar"')[0])
    text = re.sub(r"[ \t]*\n(?:[ \t]*\n)+", "\n\n", "".join(parser.parts))
    return re.sub(r" +(?=\n)|(?<=\n) (?=\S)", "", text).replace(SEPARATOR, "").strip()


def write_docs(target: Path) -> int:
    """Write every page to ``target`` (xz); returns the number of characters."""
    found = (page for folder in _FOLDERS for page in (HTML_ROOT / folder).glob("*.html"))
    pages = sorted(page for page in found if page.stem != "index")
    if not pages:
        raise SystemExit(
            f"no documentation under {HTML_ROOT}: it comes with a Debian package; "
            "run 'apt-get install python3.11-doc' and try again"
        )
    text = SEPARATOR.join(page_text(page.read_text(encoding="utf-8")) for page in pages)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(lzma.compress(text.encode()))
    return len(text)


def read_docs(source: Path) -> list[str]:
    """The pages that ``write_docs`` stored."""
    return lzma.decompress(source.read_bytes()).decode().split(SEPARATOR)


if __name__ == "__main__":
    print(write_docs(Path(sys.argv[1])), "characters")
