# SPDX-License-Identifier: Apache-2.0
"""What is known of each plugin; every stage replaces a record by a fuller one.

Shared by all stages, printed by ``bedplate backends`` and ``bedplate doctor``.
"""

from __future__ import annotations

__all__ = ["Diagnosis", "PluginRecord", "Survey", "join_reasons", "nearest"]

from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from importlib.metadata import EntryPoint

    from bedplate.contract.manifest import BackendManifest, PluginKind, ProbeResult
    from bedplate.errors import BackendError
    from bedplate.registry.hook_table import HookTable

Status = Literal["found", "loaded", "refused", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """One thing that is wrong, whoever noticed it.

    Attributes:
        severity: ``bad`` must be mended, ``warn`` should be, ``note`` is how this machine is.
        error: The sentence, its code and its facts.
        plugin: Name of the plugin concerned, or empty.
    """

    severity: Literal["bad", "warn", "note"]
    error: BackendError
    plugin: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginRecord:
    """One entry point and what became of it.

    Attributes:
        name: Entry-point name.
        kind: What its group says it is.
        distribution: Name of the distribution that offers it.
        version: Version of that distribution.
        location: Folder that the metadata lies in.
        entry_point: How to import it.
        requirements: Requirement strings of the distribution (with their markers).
        status: ``found`` by its metadata, ``loaded``, ``refused`` by a rule, or ``failed``.
        error: Why it cannot be used; raised if somebody asks for it.
        reason: ``error`` in half a sentence, for tables.
        warnings: What is wrong with it although it works.
        plugin: The plugin object, once loaded.
        manifest: Its own words, once loaded.
        probe: Its answer to the probe, once asked.
    """

    name: str
    kind: PluginKind
    distribution: str
    version: str
    location: str
    entry_point: EntryPoint
    requirements: tuple[str, ...] = ()
    status: Status = "found"
    error: BackendError | None = None
    reason: str = ""
    warnings: tuple[BackendError, ...] = ()
    plugin: Any = None
    manifest: BackendManifest | None = None
    probe: ProbeResult | None = None

    @property
    def key(self) -> str:
        """Identity in the hook table; one name may serve two kinds."""
        return f"{self.kind}:{self.name}"

    @property
    def usable(self) -> bool:
        """Whether it is loaded, probed (if a backend) and nothing speaks against it."""
        probed = self.kind != "backend" or self.probe is not None
        return self.status == "loaded" and self.error is None and probed

    @property
    def score(self) -> int:
        """The probe's score; 0 when unusable."""
        return self.probe.score if self.usable and self.probe is not None else 0

    def without(self, status: Status, error: BackendError, reason: str) -> PluginRecord:
        """The same plugin, found unusable."""
        return replace(self, status=status, error=error, reason=reason)

    def facts(self) -> dict[str, str]:
        """Fields that most fault templates need."""
        return {
            "name": self.name,
            "distribution": self.distribution,
            "version": self.version,
            "value": self.entry_point.value,
            "report": (self.manifest.docs if self.manifest else "")
            or f"the authors of {self.distribution}",
        }

    def diagnoses(self) -> Iterable[Diagnosis]:
        """What ``doctor`` says about it."""
        if self.error is not None:
            mild = {"HW002", "HW005", "HW010", "HW011", "HW012"}
            present = self.probe is not None and self.probe.present
            severity: Literal["bad", "warn", "note"] = (
                "bad" if self.error.code not in mild else "warn" if present else "note"
            )
            yield Diagnosis(severity=severity, error=self.error, plugin=self.name)
        for warning in self.warnings:
            yield Diagnosis(severity="warn", error=warning, plugin=self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """All plugins of this installation after some stage.

    Attributes:
        records: One per entry point, sorted by kind and name.
        known: Backend names that bedplate's own extras promise.
        installed: Normalised distribution name → version, of everything installed.
        home_version: Version of bedplate's own metadata; empty if it is not installed.
        findings: Diagnoses that belong to no record.
        hooks: Where loaded plugins are registered; ``None`` before *inspect*.
    """

    records: tuple[PluginRecord, ...]
    known: frozenset[str] = frozenset()
    installed: Mapping[str, str] = field(default_factory=dict)
    home_version: str = ""
    findings: tuple[Diagnosis, ...] = ()
    hooks: HookTable | None = None

    @property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """Everything that is wrong, of the installation and of every plugin."""
        own = (item for record in self.records for item in record.diagnoses())
        return (*self.findings, *own)

    @property
    def absent(self) -> tuple[str, ...]:
        """Known backend names that nothing installed provides."""
        return tuple(sorted(self.known - {record.name for record in self.backends()}))

    def backends(self) -> tuple[PluginRecord, ...]:
        """Records of backends."""
        return tuple(record for record in self.records if record.kind == "backend")

    def backend(self, name: str) -> PluginRecord | None:
        """The backend of that name; one that is not refused by a rule if there are several."""
        found = [record for record in self.backends() if record.name == name]
        return min(found, key=lambda record: record.status == "refused", default=None)


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` or nothing."""
    match = get_close_matches(name, sorted(known), n=1)
    return f" Did you mean '{match[0]}'?" if match else ""


def join_reasons(reasons: Iterable[tuple[str, str]]) -> str:
    """``a: because; b: because`` or ``nothing was tried``."""
    text = "; ".join(f"{name}: {reason}" for name, reason in reasons)
    return text or "nothing is installed"
