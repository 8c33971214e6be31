# SPDX-License-Identifier: Apache-2.0
"""The tutorial's code is the package that is installed and counted elsewhere."""

from __future__ import annotations

import re

import pytest
from tests.docs.blocks import ROOT, blocks

PAGE = ROOT / "docs" / "tutorials" / "your-first-backend.md"
PACKAGE = ROOT / "examples" / "acme" / "bedplate_acme"


def source(name):
    text = (PACKAGE / name).read_text(encoding="utf-8")
    return text.removeprefix("# SPDX-License-Identifier: Apache-2.0\n")


@pytest.mark.parametrize("name", ["ops.py", "attention.py"])
def test_files_are_shown_whole(name):
    assert source(name) in [block.text for block in blocks(PAGE, "python")]


def test_hooks_are_shown_as_they_are():
    shown = "".join(block.text for block in blocks(PAGE, "python"))
    for hook in ("register_ops", "register_attention"):
        (body,) = re.findall(
            rf"    @hookimpl\n    def bedplate_{hook}\(.*?\n(?=\n    @|\n\n)",
            source("plugin.py") + "\n\n",
            re.DOTALL,
        )
        assert body in shown


@pytest.mark.parametrize(
    "page",
    ["docs/tutorials/your-first-backend.md", "docs/explanation/why-not-patch.md", "README.md"],
)
def test_the_number_of_lines_is_true(page):
    lines = sum(len(source(path.name).splitlines()) for path in PACKAGE.glob("*.py"))
    text = (ROOT / page).read_text(encoding="utf-8")
    (said,) = re.findall(r"acme[^|\n]*?(\d+) lines|backend has (\d+) lines", text)
    assert abs(int("".join(said)) - lines) <= 5, f"{lines} lines now"
