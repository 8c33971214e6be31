# SPDX-License-Identifier: Apache-2.0
"""The matrix as it was last compiled, one file a version of Triton: read, compare, show.

A file keeps, for each architecture and each module of cases, the hash of the sources that it
was compiled from; so whoever needs the facts compiles only what has changed since.
"""

from __future__ import annotations

__all__ = [
    "FOLDER",
    "PAGE",
    "VERSIONS",
    "Golden",
    "differences",
    "load",
    "page",
    "rows_of",
    "save",
    "table",
    "why_stale",
]

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.matrix.sources import source_hash
from kernels.matrix.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

VERSIONS = ("3.6.0", "3.7.1", "3.9.0")
"""Of Triton, that results are kept for: of the oldest torch that is allowed, of
``constraints.txt``, and the newest."""

PAGE = Path(__file__).parents[2] / "docs/reference/compile-matrix.md"
"""Where the tables are."""

FOLDER = Path(__file__).parent / "golden"
"""Of the files."""

_BEGIN, _END = "<!-- generated: compile matrix -->", "<!-- end -->"
_COLUMNS = (
    "warps",
    "shared",
    "registers",
    "stack",
    "occupancy",
    "matrix",
    "narrow",
    "estimate",
)
Rows = dict[str, list[Any]]
"""``kernel of case`` → values of ``_COLUMNS``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """One file.

    Attributes:
        triton: Version of Triton.
        sources: Architecture → module of cases → hash of its sources.
        rows: Architecture → module of cases → facts of its launches.
    """

    triton: str
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    rows: dict[str, dict[str, Rows]] = field(default_factory=dict)

    def stale(self, arch: str, modules: Iterable[str]) -> list[str]:
        """Modules whose launches were not compiled from the sources as they are."""
        known = self.sources.get(arch, {})
        return [name for name in modules if known.get(name) != source_hash(arch, name)]

    def facts(self, arch: str, module: str) -> Iterator[dict[str, Any]]:
        """What ``kernels.matrix.offline`` printed of a module's launches."""
        for name, values in self.rows.get(arch, {}).get(module, {}).items():
            kernel, _, case = name.partition(" of ")
            yield dict(zip(_COLUMNS, values, strict=True)) | {"kernel": kernel, "case": case}

    def put(self, arch: str, modules: Iterable[str], facts: Iterable[dict[str, Any]]) -> None:
        """Take what was compiled of some modules now in place of what there was."""
        made = list(facts)
        for module in modules:
            rows = rows_of(each for each in made if each["module"] == module)
            self.rows.setdefault(arch, {})[module] = rows
            self.sources.setdefault(arch, {})[module] = source_hash(arch, module)


def rows_of(facts: Iterable[dict[str, Any]]) -> Rows:
    """Facts as a file keeps them; a case that launches a kernel twice has two rows."""
    rows: Rows = {}
    for each in facts:
        name = first = f"{each['kernel']} of {each['case']}"
        count = 1
        while name in rows:
            count += 1
            name = f"{first} ({count})"
        rows[name] = [each[column] for column in _COLUMNS]
    return rows


def load(triton: str) -> Golden:
    """The file of a version; an empty one if there is none."""
    path = _path(triton)
    if not path.is_file():
        return Golden(triton=triton)
    return Golden(**json.loads(path.read_text(encoding="utf-8")))


def save(golden: Golden) -> Path:
    """Write the file, one launch a line, so that a change of it can be read."""
    path = _path(golden.triton)
    path.parent.mkdir(exist_ok=True)
    lines = [
        "{",
        f'"triton": {json.dumps(golden.triton)},',
        f'"sources": {_nested(golden.sources)},',
    ]
    lines += [f'"rows": {_nested(golden.rows)}', "}", ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def differences(before: Golden, after: Golden) -> Iterator[str]:
    """What changed, a line each."""
    for arch in TARGETS:
        old, new = (_flat(golden, arch) for golden in (before, after))
        for name in sorted(old.keys() | new.keys()):
            if name not in new:
                yield f"- {arch}: {name}"
            elif name not in old:
                yield f"+ {arch}: {name}: {_words(new[name])}"
            elif old[name] != new[name]:
                yield f"! {arch}: {name}: {_words(old[name], new[name])}"


def why_stale(golden: Golden, modules: Iterable[str]) -> str:
    """What has changed since a result was made, and what to do; empty if nothing has."""
    archs: dict[str, list[str]] = {}
    for arch in TARGETS:
        for module in golden.stale(arch, modules):
            archs.setdefault(module, []).append(arch)
    if not archs:
        return ""
    which = "; ".join(f"{module} for {', '.join(names)}" for module, names in archs.items())
    return (
        f"what is kept of Triton {golden.triton} was compiled from other sources: {which}. "
        f"Run scripts/compile_matrix --triton {golden.triton} --write"
    )


def page(goldens: Iterable[Golden]) -> str:
    """The page of the docs, with the tables of these results between its markers."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    parts = []
    for kept in goldens:
        count = sum(len(rows) for each in kept.rows.values() for rows in each.values())
        parts.append(f"### Triton {kept.triton}, {count:,} launches\n\n{table(kept)}")
    body = "\n\n".join(parts)
    return f"{head}{_BEGIN}\n{body}\n{_END}{rest.partition(_END)[2]}"


def table(golden: Golden) -> str:
    """Kernel by architecture in Markdown: the largest of each figure, the least occupancy."""
    kernels = sorted(
        {row.partition(" of ")[0] for arch in TARGETS for row in _flat(golden, arch)}
    )
    lines = [f"| kernel | {' | '.join(TARGETS)} |", "| --- |" + " --- |" * len(TARGETS)]
    lines += [
        f"| `{kernel}` | {' | '.join(_worst(golden, arch, kernel) for arch in TARGETS)} |"
        for kernel in kernels
    ]
    return "\n".join(lines)


def _worst(golden: Golden, arch: str, kernel: str) -> str:
    rows = [v for n, v in _flat(golden, arch).items() if n.partition(" of ")[0] == kernel]
    if not rows:
        return "–"
    figures = [dict(zip(_COLUMNS, values, strict=True)) for values in rows]
    shared, registers, stack = (
        max(each[column] for each in figures) for column in ("shared", "registers", "stack")
    )
    least = min(each["occupancy"] for each in figures)
    return f"{shared:,} · {registers} · {stack:,} · {least}"


def _flat(golden: Golden, arch: str) -> Rows:
    return {n: v for rows in golden.rows.get(arch, {}).values() for n, v in rows.items()}


def _words(values: list[Any], after: list[Any] | None = None) -> str:
    """Figures with their names; only those that differ, where there are two of each."""
    if after is None:
        return ", ".join(f"{n} {v}" for n, v in zip(_COLUMNS, values, strict=True))
    changes = zip(_COLUMNS, values, after, strict=True)
    return ", ".join(f"{n} {old} → {new}" for n, old, new in changes if old != new)


def _nested(data: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each innermost value."""
    return _lines(data, depth=0)


def _lines(data: Any, depth: int) -> str:
    if not isinstance(data, dict) or not data:
        return json.dumps(data, ensure_ascii=False)
    indent = " " * (depth + 1)
    inner = (
        f"{indent}{json.dumps(key, ensure_ascii=False)}: {_lines(value, depth + 1)}"
        for key, value in data.items()
    )
    return "{\n" + ",\n".join(inner) + "\n" + " " * depth + "}"


def _path(triton: str) -> Path:
    return FOLDER / f"triton-{triton}.json"
