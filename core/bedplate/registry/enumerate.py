# SPDX-License-Identifier: Apache-2.0
"""Stage 1: read the metadata of everything installed; import nothing.

We walk the distributions ourselves, because the usual helpers drop the second of two
metadata directories in silence and stop at the first broken one.  There is no list of our own
backends: what belongs to bedplate is what the metadata of the distribution ``bedplate`` says.
"""

from __future__ import annotations

__all__ = ["GROUPS", "HOME", "RESERVED_WORDS", "enumerate_plugins", "name_problem"]

import re
from collections import defaultdict
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from bedplate.env import PluginFilter
from bedplate.registry.faults import fault
from bedplate.registry.records import Diagnosis, PluginRecord, Survey, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from bedplate.contract.manifest import PluginKind

HOME: Final = "bedplate"
RESERVED_WORDS: Final = frozenset({"auto", "none", "all"})
GROUPS: Final[Mapping[str, PluginKind]] = MappingProxyType(
    {
        "bedplate.backends": "backend",
        "bedplate.kernels": "kernels",
        "bedplate.plugins": "plugin",
    }
)
TOOL_EXTRAS: Final = frozenset({"conformance", "dev"})
"""Extras of bedplate that name tools; every other extra is the name of a backend."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_VALUE = re.compile(r"[\w.]+(:[\w.]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Installed:
    """Head of one distribution's metadata."""

    name: str
    version: str
    location: str
    requirements: tuple[str, ...]
    extras: frozenset[str]
    has_entries: bool
    source: metadata.Distribution

    @property
    def normal(self) -> str:
        return re.sub(r"[-_.]+", "-", self.name).lower()


def enumerate_plugins(
    allowed: PluginFilter | None = None, *, path: Sequence[str] | None = None
) -> Survey:
    """Every entry point of our groups, judged by metadata alone.

    Args:
        allowed: Which may load; all when not given.
        path: Folders to search; ``sys.path`` when not given.

    Returns:
        Records in state ``found`` or ``refused``.
    """
    distributions, findings = _first_of_each(_walk(path))
    home = distributions.get(HOME)
    records: list[PluginRecord] = []
    for distribution in distributions.values():
        if distribution.has_entries:
            good, bad = _entries(distribution)
            records += good
            findings += bad
    records.sort(key=lambda record: (record.kind, record.name, record.distribution))
    known = home.extras - TOOL_EXTRAS if home else frozenset()
    allowed = allowed or PluginFilter()
    own = {record.name for record in records if _is_home(record)}
    reserved = RESERVED_WORDS | own | (home.extras if home else frozenset())
    judged = _refuse_duplicates([_judge(r, reserved, allowed) for r in records])
    findings += _allowed_but_absent(allowed, {record.name for record in records})
    return Survey(
        records=tuple(judged),
        known=known,
        installed={name: d.version for name, d in distributions.items()},
        home_version=home.version if home else "",
        findings=tuple(findings),
    )


def name_problem(name: str, survey: Survey) -> str:
    """Why a backend of somebody else cannot have this name; empty if it can.

    Args:
        name: What it would like to be called.
        survey: Everything installed.
    """
    if not _NAME.fullmatch(name):
        return f"'{name}' is not made of a-z, 0-9 and _, beginning with a letter"
    taken = [record for record in survey.backends() if record.name == name]
    if name in RESERVED_WORDS | survey.known or any(_is_home(record) for record in taken):
        return f"'{name}' is reserved for bedplate"
    if taken:
        return f"'{name}' is installed already, from {taken[0].distribution}"
    return ""


def _walk(path: Sequence[str] | None) -> Iterator[_Installed]:
    found = metadata.distributions() if path is None else metadata.distributions(path=[*path])
    for source in found:
        try:
            head = _head(source)
        except (OSError, UnicodeDecodeError):
            continue  # a foreign distribution that cannot be read must not hide the others
        if head is not None:
            yield head


def _head(source: metadata.Distribution) -> _Installed | None:
    """The few lines we need; parsing whole files with descriptions is ten times slower."""
    text = source.read_text("METADATA") or source.read_text("PKG-INFO") or ""
    fields = defaultdict(list)
    for line in text.partition("\n\n")[0].splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields[key].append(value.strip())
    if not fields["Name"]:
        return None
    return _Installed(
        name=fields["Name"][0],
        version=(fields["Version"] or ["unknown"])[0],
        location=str(Path(str(source.locate_file(""))).resolve()),
        requirements=tuple(fields["Requires-Dist"]),
        extras=frozenset(fields["Provides-Extra"]),
        has_entries="[bedplate." in (source.read_text("entry_points.txt") or ""),
        source=source,
    )


def _first_of_each(
    found: Iterable[_Installed],
) -> tuple[dict[str, _Installed], list[Diagnosis]]:
    """Keep what Python would import; report what it hides, where it concerns us."""
    first: dict[str, _Installed] = {}
    findings: list[Diagnosis] = []
    for item in found:
        kept = first.setdefault(item.normal, item)
        same = (kept.location, kept.version) == (item.location, item.version)
        ours = item.has_entries or kept.has_entries or item.normal == HOME
        if same or not ours:  # the same folder may be on the path twice
            continue
        error = fault(
            "HW032", distribution=item.name,
            first=f"{kept.version} in {kept.location}",
            second=f"{item.version} in {item.location}",
        )  # fmt: skip
        findings.append(Diagnosis(severity="warn", error=error))
    return first, findings


def _entries(item: _Installed) -> tuple[list[PluginRecord], list[Diagnosis]]:
    try:
        points = [point for point in item.source.entry_points if point.group in GROUPS]
    except Exception as error:
        return [], [_malformed(item, f"entry_points.txt: {error}")]
    good, bad = [], []
    for point in points:
        if not _NAME.fullmatch(point.name):
            bad.append(_malformed(item, f"name {point.name!r} in group {point.group}"))
        elif not _VALUE.fullmatch(point.value):
            bad.append(_malformed(item, f"{point.name} = {point.value!r} in {point.group}"))
        else:
            good.append(_record(item, point))
    return good, bad


def _malformed(item: _Installed, problem: str) -> Diagnosis:
    error = fault(
        "HW034", distribution=item.name, version=item.version, problem=problem
    )  # fmt: skip
    return Diagnosis(severity="bad", error=error)


def _record(item: _Installed, point: metadata.EntryPoint) -> PluginRecord:
    return PluginRecord(
        name=point.name,
        kind=GROUPS[point.group],
        distribution=item.name,
        version=item.version,
        location=item.location,
        entry_point=point,
        requirements=item.requirements,
    )


def _is_home(record: PluginRecord) -> bool:
    return record.distribution.lower() == HOME


def _judge(
    record: PluginRecord, reserved: frozenset[str], allowed: PluginFilter
) -> PluginRecord:
    home = _is_home(record)
    if record.name in (RESERVED_WORDS if home else reserved):
        error = fault("HW031", **record.facts())
        return record.without("refused", error, "the name is reserved for bedplate")
    normal = re.sub(r"[-_.]+", "-", record.distribution).lower()
    rule = allowed.refusal(record.name, normal, home=home)
    if rule is None:
        return record
    return record.without("refused", fault("HW005", **record.facts(), rule=rule), rule)


def _refuse_duplicates(records: list[PluginRecord]) -> list[PluginRecord]:
    providers = defaultdict(list)
    for record in records:
        if record.status == "found":
            providers[record.key].append(record)
    return [_refuse_duplicate(record, providers[record.key]) for record in records]


def _refuse_duplicate(record: PluginRecord, rivals: list[PluginRecord]) -> PluginRecord:
    if record.status != "found" or len(rivals) < 2:
        return record
    named = ", ".join(f"{r.distribution} {r.version} ({r.location})" for r in rivals)
    command = f"BEDPLATE_PLUGINS=-{record.name}@{rivals[-1].distribution}"
    error = fault(
        "HW030", **record.facts(), kind=record.kind, providers=named, command=command
    )  # fmt: skip
    return record.without("refused", error, f"also provided by others: {named}")


def _allowed_but_absent(allowed: PluginFilter, provided: set[str]) -> list[Diagnosis]:
    installed = ", ".join(sorted(provided)) or "nothing"
    return [
        Diagnosis(
            severity="warn", plugin=name,
            error=fault("HW033", name=name, installed=installed, hint=nearest(name, provided)),
        )
        for name in sorted((allowed.allow or frozenset()) - provided)
    ]  # fmt: skip
