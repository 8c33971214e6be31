#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the generated parts of ``docs/reference`` from the code.

A part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``; prose around it is
written by hand.  Without arguments the files are rewritten; ``--check`` only says which are
stale (the tests of the documentation do the same).
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bedplate import contract, env, errors
from bedplate.cli.main import COMMANDS, cli
from bedplate.config import EngineConfig
from bedplate.conformance.matrix import level_table, support_matrix
from bedplate.conformance.report import read_report
from bedplate.contract import capabilities
from bedplate.contract.hooks import BedplateHooks
from bedplate.registry.faults import FAULTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "reference"
PART = re.compile(r"(<!-- generated: ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in lines
    )


def code(text: object) -> str:
    """As code, in single backticks; reStructuredText's double ones become single."""
    return f"`{text}`"


def prose(text: str) -> str:
    """A docstring's sentences on one line, in Markdown."""
    return " ".join(text.split()).replace("``", "`")


def attribute_docs(record: type) -> dict[str, str]:
    """Field → sentence, from the ``Attributes:`` section of a docstring."""
    section = inspect.getdoc(record).partition("Attributes:\n")[2].split("\n\n")[0]
    found: dict[str, str] = {}
    for line in inspect.cleandoc(section).splitlines():
        if match := re.match(r"(\w+): (.*)", line):
            name, found[match[1]] = match[1], match[2]
        elif line.strip():
            found[name] += " " + line.strip()
    return {name: prose(text) for name, text in found.items()}


def record_table(record: type) -> str:
    """Fields, types, defaults and sentences of a dataclass."""
    docs, rows = attribute_docs(record), []
    for field in fields(record):
        if field.default is not MISSING:
            default = field.default
            # A nested record shows as its name: its own fields have a table.
            shown = type(default).__name__ + "()" if is_dataclass(default) else repr(default)
        else:
            shown = "required" if field.default_factory is MISSING else "empty"
        kind = str(field.type)
        sentence = docs.get(field.name, "")
        rows.append([code(field.name), code(kind), code(shown), sentence])
    return table(["name", "type", "default", "meaning"], rows)


def hooks() -> str:
    """Every hook with its signature and docstring."""
    parts = []
    for name, function in vars(BedplateHooks).items():
        if not name.startswith("bedplate_"):
            continue
        signature = inspect.signature(function)
        arguments = ", ".join(list(signature.parameters)[1:])
        result = str(signature.return_annotation)
        text = inspect.getdoc(function).replace("``", "`")
        text = re.sub(r"(?m)^(Args|Returns):\n    ", r"- *\1*: ", text)
        text = re.sub(r"(?m)^    ", "  ", text)
        parts.append(f"### `{name}`\n\n`({arguments}) → {result}`\n\n{text}")
    return "\n\n".join(parts)


def config() -> str:
    """Settings with the option of ``bedplate generate`` that sets them."""
    group = click.Context(cli)
    generate = cli.get_command(group, "generate")
    options = {
        p.name: max((o for o in p.opts), key=len)
        for p in generate.params
        if isinstance(p, click.Option)
    }
    docs, rows = attribute_docs(EngineConfig), []
    for field in fields(EngineConfig):
        if field.name == "sources":
            continue
        default = "{}" if field.default is MISSING else repr(field.default)
        option = code(options[field.name]) if field.name in options else ""
        option = "`MODEL`" if field.name == "model" else option
        rows.append([code(field.name), code(default), option, docs[field.name]])
    return table(["setting", "default", "option", "meaning"], rows)


def commands() -> str:
    """Help of every command."""

    def shown(command: click.Command, name: str) -> str:
        settings = {**cli.context_settings, "terminal_width": 88}
        with click.Context(command, info_name=name, **settings) as context:
            text = re.sub(r"(?m)[ \t]+$", "", command.get_help(context))
        return f"### `{name}`\n\n```text\n{text}\n```"

    group = click.Context(cli)
    parts = [shown(cli.get_command(group, n), f"bedplate {n}") for n in sorted(COMMANDS)]
    return "\n\n".join([shown(cli, "bedplate"), *parts])


def environment() -> str:
    """Every variable."""
    rows = [[code(v.name), v.forms, v.sentence] for v in env.VARIABLES.values()]
    return table(["variable", "values", "meaning"], rows)


def error_tree() -> str:
    """The tree, as drawn in ``errors``, then one table of classes."""
    drawn = inspect.cleandoc(
        "    BedplateError\n" + errors.__doc__.partition("BedplateError\n")[2]
    )
    rows = []
    for name in errors.__all__:
        kind = getattr(errors, name)
        if issubclass(kind, errors.BedplateError):
            meaning = prose(inspect.getdoc(kind).split("\n\n")[0])
            rows.append([code(name), code(kind.code), str(kind.exit_status), meaning])
    return f"```text\n{drawn.rstrip()}\n```\n\n" + table(
        ["class", "code", "exit status", "meaning"], rows
    )


def faults() -> str:
    """Every way in which a backend or plugin fails."""
    return "\n\n".join(
        f"### {number}\n\n**{entry.title}.** Raises `{entry.error.__name__}`.\n\n"
        f"- What: {_blanks(entry.what)}\n"
        f"- Why: {_blanks(entry.why)}\n"
        f"- Next: {_blanks(entry.next)}"
        for number, entry in FAULTS.items()
    )


def capability_tables() -> str:
    """Every question with its conservative default."""
    named = (getattr(capabilities, name) for name in capabilities.__all__)
    records = [record for record in named if is_dataclass(record)]
    return "\n\n".join(
        f"### `{record.__name__}`\n\n{_sentence(record, '')}\n\n{record_table(record)}"
        for record in records
    )


def contract_names() -> str:
    """Every name of the contract, by module, with its first sentence."""
    modules: dict[str, list[str]] = {}
    for name in contract.__all__:
        thing = getattr(contract, name)
        home = getattr(thing, "__module__", "")
        home = home if home.startswith("bedplate") else _HOMES[name]
        modules.setdefault(home, []).append(name)
    parts = []
    for home in sorted(modules):
        module = sys.modules[home]
        rows = [[code(n), _sentence(getattr(contract, n), n)] for n in modules[home]]
        title = prose(str(module.__doc__).split("\n\n")[0])
        parts.append(f"### `{home}`\n\n{title}\n\n{table(['name', 'meaning'], rows)}")
    return "\n\n".join(parts)


_HOMES = {
    "API_VERSION": "bedplate.contract.version",
    "PROJECT": "bedplate.contract.hooks",
    "hookimpl": "bedplate.contract.hooks",
    "hookspec": "bedplate.contract.hooks",
}
_CONSTANTS = {
    "API_VERSION": "Version of the contract as (major, minor), apart from the package's.",
    "PROJECT": "Name under which hooks are registered.",
    "hookimpl": "Marks an implementation of a hook.",
    "hookspec": "Marks a specification; the core's own use.",
}


def _sentence(thing: object, name: str) -> str:
    return _CONSTANTS.get(name) or prose(inspect.getdoc(thing).split("\n\n")[0])


def _blanks(template: str) -> str:
    """Fields as words in angle quotes, so that a page shows where facts stand."""
    return re.sub(r"\{(\w+)\}", r"‹\1›", template)


def matrix() -> str:
    """Support of every backend with a committed report."""
    return support_matrix(
        [read_report(p) for p in sorted(REFERENCE.glob("conformance/*.json"))]
    )


PARTS: dict[str, Callable[[], str]] = {
    "capabilities": capability_tables,
    "cli": commands,
    "config": config,
    "contract": contract_names,
    "environment": environment,
    "errors": error_tree,
    "faults": faults,
    "hooks": hooks,
    "levels": level_table,
    "matrix": matrix,
}


def pages() -> Iterator[tuple[Path, str, str]]:
    """(path, text now, text as it should be) of every page with a generated part."""
    for path in sorted(REFERENCE.glob("*.md")):
        now = path.read_text(encoding="utf-8")
        fresh = PART.sub(
            lambda m: f"{m[1]}{PARTS[m[2]]()}\n{m[3]}" if m[2] in PARTS else m[0], now
        )
        yield path, now, fresh


def stale_pages() -> list[str]:
    """Names of pages that would change."""
    return [path.name for path, now, fresh in pages() if now != fresh]


def main() -> int:
    """Exit status 1 if ``--check`` finds stale pages."""
    if "--check" in sys.argv[1:]:
        stale = stale_pages()
        if stale:
            print(f"Stale: {', '.join(stale)}. Run: scripts/generate_docs.py")
        return bool(stale)
    for path, now, fresh in pages():
        if now != fresh:
            path.write_text(fresh, encoding="utf-8")
            print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
