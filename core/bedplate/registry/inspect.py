# SPDX-License-Identifier: Apache-2.0
"""Stage 2: import each plugin's light module and hold it against the contract.

Every import is guarded: a broken plugin becomes a record with an error, and the next one is
looked at.  Nobody's manifest, hooks or requirements are trusted before they are checked here.
"""

from __future__ import annotations

__all__ = ["inspect_plugins"]

import inspect
import sys
import time
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from packaging.requirements import InvalidRequirement, Requirement

from bedplate.contract.manifest import BackendManifest
from bedplate.contract.version import API_VERSION
from bedplate.registry.faults import fault
from bedplate.registry.hook_table import (
    HookTable,
    cause_of,
    hook_failure,
    links_badly,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bedplate.registry.records import PluginRecord, Survey

SLOW_IMPORT_S: Final = 1.0
HEAVY: Final = "torch"
REQUIRED_OF_BACKENDS: Final = (
    "bedplate_probe", "bedplate_activate", "bedplate_capabilities",
)  # fmt: skip


def inspect_plugins(survey: Survey) -> Survey:
    """Import and check everything that enumeration found.

    Returns:
        The survey with records ``loaded``, ``refused`` or ``failed``, and the hook table in
        which the loaded ones are registered, in the order of the records.
    """
    hooks = HookTable()
    records = tuple(
        _inspect(record, hooks, survey.installed) if record.status == "found" else record
        for record in survey.records
    )
    return replace(survey, records=records, hooks=hooks)


def _inspect(
    record: PluginRecord, hooks: HookTable, installed: Mapping[str, str]
) -> PluginRecord:
    record = _load(record, installed)
    for check in (_read_manifest, _check_api, _check_manifest):
        if record.status == "found":
            record = check(record)
    if record.status == "found":
        record = _register(record, hooks)
    return _check_requirements(record, installed) if record.status == "loaded" else record


def _load(record: PluginRecord, installed: Mapping[str, str]) -> PluginRecord:
    heavy_before = HEAVY in sys.modules
    start = time.perf_counter()
    try:
        plugin = record.entry_point.load()
    except (Exception, SystemExit) as error:
        return _failed_import(record, error, installed)
    seconds = time.perf_counter() - start
    problems = []
    if HEAVY in sys.modules and not heavy_before:
        problems.append(f"imported {HEAVY}")
    if seconds > SLOW_IMPORT_S:
        problems.append(f"took {seconds:.1f} s")
    if problems:
        warning = fault("HW042", **record.facts(), problem=" and ".join(problems))
        record = replace(record, warnings=(*record.warnings, warning))
    return replace(record, plugin=plugin)


def _failed_import(
    record: PluginRecord, error: BaseException, installed: Mapping[str, str]
) -> PluginRecord:
    cause = cause_of(error)
    if links_badly(error):
        torch = installed.get("torch", "(none)")
        failure = fault("HW021", **record.facts(), torch=torch, cause=cause)
    else:
        frames = _last_frames(error)
        failure = fault("HW040", **record.facts(), cause=cause, frames=frames)
    failure.__cause__ = error
    return record.without("failed", failure, f"import failed: {cause}")


def _last_frames(error: BaseException) -> str:
    frames = [
        f"{frame.filename}:{frame.lineno} in {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and frame.filename != __file__
    ]
    return ", ".join(frames[-3:]) or "none in the plugin"


def _invalid(record: PluginRecord, problems: list[str]) -> PluginRecord:
    error = fault("HW035", **record.facts(), problems="; ".join(problems))
    return record.without("refused", error, "; ".join(problems))


def _read_manifest(record: PluginRecord) -> PluginRecord:
    """Ask for the manifest without pluggy: its API range decides whether pluggy may look."""
    if inspect.isclass(record.plugin):
        return _invalid(record, ["it is a class; offer an instance or a module"])
    function = getattr(record.plugin, "bedplate_manifest", None)
    if function is None:
        return _invalid(record, ["it has no bedplate_manifest"])
    try:
        manifest = function()
    except (Exception, SystemExit) as error:
        failure = hook_failure(record, "bedplate_manifest", None, error)
        return record.without("failed", failure, f"manifest failed: {cause_of(error)}")
    if not isinstance(manifest, BackendManifest):
        kind = type(manifest).__name__
        return _invalid(record, [f"bedplate_manifest gave {kind}, not BackendManifest"])
    return replace(record, manifest=manifest)


def _check_api(record: PluginRecord) -> PluginRecord:
    assert record.manifest is not None
    older = record.manifest.api.older_side()
    if older is None:
        return record
    name = record.distribution if older == "plugin" else "bedplate"
    error = fault(
        "HW020", **record.facts(), wanted=str(record.manifest.api),
        spoken=".".join(map(str, API_VERSION)), command=f"pip install -U {name}",
        older="bedplate" if older == "core" else "the plugin",
    )  # fmt: skip
    return record.without("refused", error, f"needs plugin API {record.manifest.api}")


def _check_manifest(record: PluginRecord) -> PluginRecord:
    assert record.manifest is not None
    problems = []
    if record.manifest.name != record.name:
        problems.append(f"its manifest says name '{record.manifest.name}'")
    if record.manifest.kind != record.kind:
        problems.append(
            f"its manifest says kind '{record.manifest.kind}', its group '{record.kind}'"
        )
    for text in record.manifest.requires:
        try:
            Requirement(text)
        except InvalidRequirement as error:
            problems.append(f"requirement {text!r} cannot be read: {cause_of(error)}")
    return _invalid(record, problems) if problems else record


def _register(record: PluginRecord, hooks: HookTable) -> PluginRecord:
    try:
        problems = hooks.problems_of(record.plugin)
        if not problems:
            hooks.register(record.key, record.plugin)
    except Exception as error:
        problems = [" ".join(str(error).split())]
    if problems:
        text = "; ".join(problems)
        refusal = fault("HW036", **record.facts(), problems=text)
        return record.without("refused", refusal, text)
    missing = [
        f"a backend must implement {hook}"
        for hook in (REQUIRED_OF_BACKENDS if record.kind == "backend" else ())
        if not hooks.implements(record.key, hook)
    ]
    if missing:
        hooks.manager.unregister(name=record.key)
        return _invalid(record, missing)
    return replace(record, status="loaded")


def _check_requirements(record: PluginRecord, installed: Mapping[str, str]) -> PluginRecord:
    assert record.manifest is not None
    missing = [
        f"{requirement} ({found})"
        for requirement, extra in _requirements(record)
        if (found := _unmet(requirement, installed))
    ]
    if not missing:
        return record
    by_extra = any(extra for _requirement, extra in _requirements(record))
    command = (
        f"pip install '{record.distribution}[{record.name}]'"
        if by_extra
        else "pip install " + " ".join(f"'{text}'" for text in record.manifest.requires)
    )
    text = ", ".join(missing)
    error = fault("HW002", **record.facts(), missing=text, command=command)
    return replace(record, error=error, reason=f"requirements not met: {text}")


def _requirements(record: PluginRecord) -> Iterator[tuple[Requirement, bool]]:
    """What must be installed: (requirement, whether the extra of the same name brings it)."""
    for text in record.requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue  # its installer would have refused it; nothing we can check
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            continue
        if marker.evaluate({"extra": record.name}):
            requirement.marker = None
            yield requirement, True
    for text in record.manifest.requires if record.manifest else ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate():
            yield requirement, False


def _unmet(requirement: Requirement, installed: Mapping[str, str]) -> str | None:
    """``missing`` or ``have 1.2``, or ``None`` when the requirement is met."""
    name = requirement.name.lower().replace("_", "-").replace(".", "-")
    version = installed.get(name)
    if version is None:
        return "missing"
    met = requirement.specifier.contains(version, prereleases=True)
    return None if met else f"have {version}"
