# SPDX-License-Identifier: Apache-2.0
"""Every Python block runs; every ``$ bedplate …`` prints what the page says.

Blocks of one page share their names, in order, as a reader would type them.  In a ``console``
block ``…`` stands for anything, on a line or instead of lines; plugins of this tree, which a
reader has not installed, are blocked, and the lines that say so are left out.  Blocks that
only a shell can run are marked ``sh`` and are not run here, nor is what stands in the READMEs
of folders.
"""

from __future__ import annotations

import linecache
import re
import shlex

import pytest
from click.testing import CliRunner
from tests.docs.blocks import PAGES, ROOT, blocks

from bedplate.cli.main import cli
from bedplate.errors import BedplateError

PYTHON = [page for page in PAGES if blocks(page, "python")]
CONSOLE = [
    page
    for page in PAGES
    if blocks(page, "console") and (page.parent == ROOT or ROOT / "docs" in page.parents)
]


def name(page):
    return str(page.relative_to(ROOT))


def run(line: str) -> str:
    """Output of one command of ours, in this process."""
    words = shlex.split(line)
    assert words[0] == "bedplate", line
    result = CliRunner().invoke(cli, words[1:])
    if isinstance(result.exception, BedplateError):  # as ``main`` shows it
        return f"{result.output}bedplate: {result.exception}"
    assert result.exception is None, result.output
    return result.output


def matches(expected: str, actual: str) -> bool:
    """Whether the output is as shown; widths of columns depend on what is installed."""

    def clean(text: str) -> str:
        return "\n".join(
            re.sub(r" +", " ", line).rstrip()
            for line in text.strip().splitlines()
            if "no plugins from outside bedplate were allowed" not in line
        )

    lines = re.escape(clean(expected)).replace("\\\n…\\\n", r"(\n.*)?\n")
    return re.fullmatch(lines.replace("…", ".*"), clean(actual), re.DOTALL) is not None


@pytest.mark.parametrize("page", PYTHON, ids=name)
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__docs__"}
    for block in blocks(page, "python"):
        source = "\n" * (block.line - 1) + block.text
        linecache.cache[str(page)] = (len(source), None, source.splitlines(True), str(page))
        exec(compile(source, str(page), "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", CONSOLE, ids=name)
def test_console_blocks_print_what_they_say(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BEDPLATE_PLUGINS", "none")
    for block in blocks(page, "console"):
        for command, expected in re.findall(
            r"^\$ (.*?)\n(.*?)(?=^\$ |\Z)", block.text, re.MULTILINE | re.DOTALL
        ):
            actual = run(command)
            assert matches(expected.strip(), actual), f"{name(page)}: {command}\n{actual}"


def test_dots_stand_for_anything_and_nothing_else_does():
    assert matches("a…d\n…", "a b c d  \nmore\nlines\n")
    assert matches("a  b\n…\nc", "a b\nc")
    assert not matches("a.c", "abc")
    assert not matches("a\n…\nc", "a\nb")
