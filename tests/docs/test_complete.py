# SPDX-License-Identifier: Apache-2.0
"""Nothing that users touch is missing from the documentation, and generated parts are fresh."""

from __future__ import annotations

import importlib.util
import re

import click
import pytest
from tests.docs.blocks import ROOT, anchors

import bedplate
from bedplate import contract, env, errors
from bedplate.cli.main import COMMANDS, cli
from bedplate.config import setting_names
from bedplate.contract.hooks import BedplateHooks
from bedplate.registry.faults import FAULTS

DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"


def text(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


def missing(names, page: str) -> list[str]:
    found = text(page)
    return [n for n in names if not re.search(rf"(?<![\w-]){re.escape(n)}(?!\w)", found)]


def generator():
    path = ROOT / "scripts" / "generate_docs.py"
    spec = importlib.util.spec_from_file_location("generate_docs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_fresh():
    assert generator().stale_pages() == [], "run scripts/generate_docs.py"


def test_every_generated_part_has_a_place():
    places = re.findall(r"<!-- generated: (\w+) -->", "".join(map(text, names_of_pages())))
    assert sorted(places) == sorted(generator().PARTS)


def names_of_pages():
    return [path.name for path in REFERENCE.glob("*.md")]


def test_hooks():
    hooks = [name for name in vars(BedplateHooks) if name.startswith("bedplate_")]
    assert len(hooks) >= 17
    assert set(hooks) <= anchors(REFERENCE / "hooks.md")


def test_settings_and_variables():
    assert missing(setting_names(), "config.md") == []
    assert missing(env.VARIABLES, "environment.md") == []


def test_commands_and_options():
    context = click.Context(cli)
    for name in COMMANDS:
        assert f"bedplate-{name}" in anchors(REFERENCE / "cli.md")
        spellings = [o for p in cli.get_command(context, name).params for o in p.opts]
        assert missing([o for o in spellings if o[0] == "-"], "cli.md") == []


def test_error_codes():
    assert {code.lower() for code in FAULTS} <= anchors(REFERENCE / "errors.md")
    classes = [getattr(errors, name) for name in errors.__all__]
    codes = [kind.code for kind in classes if issubclass(kind, errors.BedplateError)]
    assert missing([*codes, *errors.__all__], "errors.md") == []


def test_the_tree_of_errors_is_drawn_as_it_is():
    drawn = re.search(r"BedplateError\n.*?\n\n", errors.__doc__ + "\n\n", re.DOTALL)[0]
    names = re.findall(r"\w+Error(?= |$)", re.sub(r"\(.*?\)", "", drawn), re.MULTILINE)
    real = [n for n in errors.__all__ if issubclass(getattr(errors, n), errors.BedplateError)]
    assert sorted(names) == sorted(real)


def test_public_names():
    assert missing(contract.__all__, "contract.md") == []
    everything = "".join(p.read_text(encoding="utf-8") for p in DOCS.rglob("*.md"))
    public = set(bedplate.__all__) - {"__version__"}
    assert {name for name in public if f"`{name}`" not in everything} == set()


@pytest.mark.parametrize("name", ["ForwardMode", "CaptureHiddenMode"])
def test_the_vocabulary_has_every_mode(name):
    assert missing(getattr(bedplate, name).__members__, "vocabulary.md") == []


def test_the_vocabulary_has_every_field_of_a_batch():
    from bedplate.batch.forward_batch import ExtendPart

    fields = bedplate.ForwardBatch.__dataclass_fields__
    assert missing([*fields, *ExtendPart.__dataclass_fields__], "vocabulary.md") == []


def test_decisions_are_numbered_without_a_gap_and_fit_a_page():
    records = sorted((DOCS / "decisions").glob("[0-9]*.md"))
    assert [int(path.name[:4]) for path in records] == list(range(1, len(records) + 1))
    for path in records:
        body = path.read_text(encoding="utf-8")
        assert len(body.splitlines()) <= 60, path.name
        for heading in ("Status", "Question", "Options", "Decision", "What follows",
                        "How we would notice"):  # fmt: skip
            assert f"**{heading}" in body, f"{path.name}: {heading}"


def test_fragments_have_a_known_type():
    names = [p.name for p in (ROOT / "changelog.d").iterdir() if p.name != "README.md"]
    kinds = "breaking|feature|fix|backend|docs|internal"
    assert [n for n in names if not re.fullmatch(rf"\d+\.({kinds})\.md", n)] == []
