# SPDX-License-Identifier: Apache-2.0
"""What a plugin says about itself before anything heavy is imported.

Pure data.  ``plugin.py`` of every package returns these from its hooks, so this module (and
all it imports) must stay free of torch.
"""

from __future__ import annotations

__all__ = [
    "BackendManifest",
    "DeviceFacts",
    "PluginKind",
    "ProbeRequest",
    "ProbeResult",
    "ReportItem",
]

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from bedplate.contract.version import ApiRange

if TYPE_CHECKING:
    from collections.abc import Mapping

PluginKind = Literal["backend", "kernels", "plugin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendManifest:
    """Identity and requirements of one plugin, of any kind.

    Attributes:
        name: Must equal the entry-point name; ``[a-z][a-z0-9_]*``.
        kind: ``backend``, ``kernels`` (override pack) or ``plugin`` (observer and others);
            must fit the entry-point group.
        summary: One line for listings.
        api: Contract versions that it works with.
        targets: For ``kernels``: names of the backends it overrides; empty means any.
        requires: Requirement strings (PEP 508) checked against the installed
            distributions before activation, besides those of the extra of the same name.
        remedy: What to do when ``probe`` says no, as a sentence with a command.
        docs: Address or path of its documentation.
    """

    name: str
    kind: PluginKind = "backend"
    summary: str = ""
    api: ApiRange = field(default_factory=ApiRange)
    targets: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    remedy: str = ""
    docs: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """One device that a probe saw.

    Attributes:
        index: Number that ``--backend name:index`` takes.
        name: As the vendor calls it.
        arch: Architecture word, such as ``x86_64-v4``.
        memory_bytes: Total memory, 0 when unknown without a device context.
    """

    index: int
    name: str
    arch: str = ""
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRequest:
    """Question of the probe stage.

    Attributes:
        environment: The process environment, read-only.  Probes read it from here, so that
            tests and ``doctor`` can pretend.
    """

    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What a backend found on this machine without creating a device context.

    Attributes:
        score: 0 unusable here; 1–99 host-class; 100–499 integrated; 500–999 accelerators.
        devices: What it would run on.
        reasons: Sentences; mandatory when the score is 0.
        facts: Versions and findings that ``doctor`` prints.
        code: Stable error code (``HW010`` driver or runtime absent, ``HW011`` wrong torch
            flavour, ``HW012`` architecture too old) when the score is 0.
        present: A device of this kind seems to be there even though it cannot be used;
            ``auto`` then refuses to continue on a lower class.
        only_by_name: ``auto`` never chooses it, however little else there is; for what stands
            in for a device.
    """

    score: int
    devices: tuple[DeviceFacts, ...] = ()
    reasons: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    code: str = "HW010"
    present: bool = False
    only_by_name: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportItem:
    """One line of ``bedplate doctor``.

    Attributes:
        name: What was looked at.
        value: What was found.
        status: ``ok``, ``warn`` or ``bad``.
        remedy: What to do about it, when not ``ok``.
    """

    name: str
    value: str
    status: Literal["ok", "warn", "bad"] = "ok"
    remedy: str = ""
