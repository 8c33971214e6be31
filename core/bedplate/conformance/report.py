# SPDX-License-Identifier: Apache-2.0
"""The report of one run: what was examined, with what, and every result; JSON.

Committed reports are the only source of the support matrix in the documentation, so that a
cell of it can always be traced to a run.
"""

from __future__ import annotations

__all__ = ["Report", "machine_facts", "read_report", "summary_rows", "write_report"]

import json
import platform
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from bedplate.conformance.check import OUTCOMES, Result
from bedplate.conformance.levels import LEVELS
from bedplate.contract.version import API_VERSION
from bedplate.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from bedplate.conformance.subject import Subject

FORMAT = 1
_PACKAGES = ("bedplate", "torch", "transformers", "pytest", "hypothesis")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run.

    Attributes:
        backend: Name of the backend.
        facts: Versions, device and capabilities, as text.
        complete: Whether every check of the levels was run.
        levels: Which levels were run.
        results: One per check, in order.
    """

    backend: str
    facts: Mapping[str, str]
    complete: bool
    levels: tuple[int, ...]
    results: tuple[Result, ...]

    def counts(self, level: int) -> dict[str, int]:
        """Outcome → how many checks of the level."""
        found = Counter(r.outcome for r in self.results if r.level == level)
        return {outcome: found[outcome] for outcome in OUTCOMES if found[outcome]}

    def of(self, prefix: str) -> list[Result]:
        """Results of checks whose identifier begins so."""
        return [r for r in self.results if r.check.startswith(prefix)]


def machine_facts(subject: Subject) -> dict[str, str]:
    """What a reader needs to know of a run."""
    record, capabilities = subject.record, subject.capabilities
    probe = record.probe
    device = probe.devices[subject.bound.device_index].name if probe and probe.devices else ""
    graph = capabilities.graph
    return {
        "api": ".".join(map(str, API_VERSION)),
        "distribution": f"{record.distribution} {record.version}",
        "device": device,
        "arch": capabilities.arch,
        "compute dtypes": ", ".join(capabilities.compute_dtypes),
        "cache dtypes": ", ".join(capabilities.kv_dtypes),
        "page sizes": ", ".join(map(str, capabilities.memory.page_sizes)),
        "attention": ", ".join(p.name for p in subject.bound.attention_providers),
        "graphs": ("by default" if graph.default else "on request")
        if graph.supported
        else "no",
        "determinism": capabilities.determinism,
        "python": platform.python_version(),
        **{name: found for name in _PACKAGES if (found := _version(name))},
        "begun": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def write_report(report: Report, path: Path) -> None:
    """Write the report; the folder is made if it is missing."""
    data = {
        "format": FORMAT,
        "backend": report.backend,
        "complete": report.complete,
        "levels": list(report.levels),
        "facts": dict(report.facts),
        "counts": {f"L{n}": report.counts(n) for n in report.levels},
        "results": [_short(result) for result in report.results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_dumped(data), encoding="utf-8")


def read_report(path: Path) -> Report:
    """Read a report.

    Raises:
        ConfigError: The file is no report of this format.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, not {FORMAT}")  # noqa: TRY301
        return Report(
            backend=data["backend"],
            facts=data["facts"],
            complete=data["complete"],
            levels=tuple(data["levels"]),
            results=tuple(Result.from_json(entry) for entry in data["results"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no conformance report: {type(error).__name__}: {error}. Make one: "
            "`bedplate conformance --backend NAME --report FILE`"
        ) from error


def summary_rows(results: Iterable[Result]) -> list[list[str]]:
    """Level, its title, and the number of each outcome, for tables."""
    by_level: dict[int, Counter[str]] = {}
    for result in results:
        by_level.setdefault(result.level, Counter())[result.outcome] += 1
    return [
        [f"L{level.number}", level.title, *(str(counts[o] or "") for o in OUTCOMES)]
        for level in LEVELS
        if (counts := by_level.get(level.number)) is not None
    ]


def _short(result: Result) -> dict[str, Any]:
    """Without what is empty, and without the command that the identifier gives anyway."""
    data = {k: v for k, v in result.to_json().items() if v or k == "seconds"}
    data.pop("reproducer", None)
    data["seconds"] = round(result.seconds, 2)
    return data


def _dumped(data: dict[str, Any]) -> str:
    """One line per result, so that a diff of two reports can be read."""
    results = data.pop("results")
    head = json.dumps(data, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in results)
    return f'{head},\n "results": [\n  {lines}\n ]\n}}\n'


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
