# SPDX-License-Identifier: Apache-2.0
"""Every way in which a backend or plugin can fail, as data: code, title, template, class.

The sentences live apart from the code that detects a failure, so that the error page of the
documentation is made from them and a test can trigger each one.  All stages of the registry
call ``fault``; the codes are stable and never reused.
"""

from __future__ import annotations

__all__ = ["FAULTS", "Fault", "fault"]

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from bedplate.errors import (
    BackendError,
    BackendIncompatibleError,
    BackendNotFoundError,
    BackendUnavailableError,
    ContractError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One failure.

    Attributes:
        title: A few words; the heading of the documentation.
        what: Template of what happened.
        why: Template of the cause.
        next: Template of the remedy; holds a command in backticks.
        error: Class that is raised, or kept in a record when nobody asked for the plugin.
    """

    title: str
    what: str
    why: str
    next: str
    error: type[BackendError] = BackendUnavailableError


def fault(code: str, /, **facts: object) -> BackendError:
    """The error of ``code`` with its sentence filled in.

    Args:
        code: A key of ``FAULTS``.
        facts: Fields of the template and anything else worth keeping; they become
            attributes of the error.
    """
    entry = FAULTS[code]
    message = " ".join(part.format(**facts) for part in (entry.what, entry.why, entry.next))
    return entry.error(message, code=code, **facts)


_WHO = "Plugin '{name}' {version} (from {distribution})"

FAULTS: Final[Mapping[str, Fault]] = MappingProxyType({
    "HW001": Fault(
        title="No backend of that name",
        what="Backend '{name}' ({source}) is not installed.",
        why="Installed: {installed}.{hint}",
        next="To see all: `bedplate backends`.",
        error=BackendNotFoundError,
    ),
    "HW002": Fault(
        title="Requirements of a backend are missing",
        what="Backend '{name}' comes with {distribution}, but its requirements are not met:",
        why="{missing}.",
        next="Run: `{command}`.",
    ),
    "HW003": Fault(
        title="A device is present, and nothing can use it",
        what="A device seems to be present ({present}), but no backend can run here.",
        why="{reasons}.",
        next="After mending the cause, run: `bedplate doctor`.",
    ),
    "HW004": Fault(
        title="Known name, absent from this release",
        what="Backend '{name}' ({source}) is a known name: an extra of bedplate {version}.",
        why="This release does not contain that backend. Usable here: {usable}.",
        next="Upgrade bedplate, or choose one of those; to see all: `bedplate backends`.",
    ),
    "HW005": Fault(
        title="Blocked by a setting",
        what="Plugin '{name}' (from {distribution}) was not loaded.",
        why="{rule}.",
        next="Change BEDPLATE_PLUGINS or drop `--no-plugins`; to see all: `bedplate backends`.",
    ),
    "HW006": Fault(
        title="None of the candidates can run here",
        what="No backend for '{request}' ({source}).",
        why="{reasons}.",
        next="To see what is missing: `bedplate doctor`.",
    ),
    "HW007": Fault(
        title="No device of that number",
        what="Backend '{name}' has no device {index} ({source}).",
        why="It sees: {devices}.",
        next="To see all: `bedplate backends --json`.",
    ),
    "HW010": Fault(
        title="Driver or runtime absent",
        what="Backend '{name}' is installed, but cannot run here: {reasons}.",
        why="Facts: {found}.",
        next="{remedy} Afterwards: `bedplate doctor --backend {name}`.",
    ),
    "HW011": Fault(
        title="Wrong flavour of torch",
        what="Backend '{name}' needs another build of torch: {reasons}.",
        why="Extras cannot choose the index that torch comes from. Facts: {found}.",
        next="{remedy} Afterwards: `bedplate doctor --backend {name}`.",
    ),
    "HW012": Fault(
        title="Device architecture too old",
        what="Backend '{name}' cannot use the device that is here: {reasons}.",
        why="Facts: {found}.",
        next="{remedy} Afterwards: `bedplate doctor --backend {name}`.",
    ),
    "HW020": Fault(
        title="Contract versions differ",
        what=_WHO + " needs plugin API {wanted}; this bedplate speaks {spoken}.",
        why="The older side is {older}. It was not loaded.",
        next="Run: `{command}`.",
        error=BackendIncompatibleError,
    ),
    "HW021": Fault(
        title="Built for another torch",
        what=_WHO + " does not fit the installed torch {torch}.",
        why="A binary part of it could not be linked: {cause}.",
        next="Install matching builds: `pip install -U {distribution} torch`.",
        error=BackendIncompatibleError,
    ),
    "HW030": Fault(
        title="Two providers of one name",
        what="Several entry points provide {kind} '{name}': {providers}.",
        why="None of them was loaded, because picking one would be a guess.",
        next="Uninstall or block one, for instance: `{command}`.",
    ),
    "HW031": Fault(
        title="Reserved name",
        what="{distribution} {version} registers the reserved name '{name}'; ignored.",
        why="Names of bedplate's own entry points and extras, and auto, none, all, belong to "
        "bedplate.",
        next="Ask its author to rename it; to be rid of it: `pip uninstall {distribution}`.",
    ),
    "HW032": Fault(
        title="Shadowed metadata",
        what="Two metadata directories for {distribution}: {first} hides {second}.",
        why="Entry points of the second are invisible.",
        next="Delete the stale one, or: `pip install --force-reinstall {distribution}`.",
    ),
    "HW033": Fault(
        title="Allowed, but absent",
        what="BEDPLATE_PLUGINS names '{name}', which no installed distribution provides.",
        why="Provided: {installed}.{hint}",
        next="Correct the name, or install it; to see all: `bedplate backends`.",
    ),
    "HW034": Fault(
        title="Malformed entry point",
        what="{distribution} {version} offers an entry point that cannot be used: {problem}.",
        why="Names match [a-z][a-z0-9_]* and values look like 'package.plugin:backend'.",
        next="Ask its author; to be rid of it: `pip uninstall {distribution}`.",
    ),
    "HW035": Fault(
        title="Not a valid plugin",
        what=_WHO + " is not what its entry point promises:",
        why="{problems}.",
        next="Ask its author, or block it: `BEDPLATE_PLUGINS=-{name}`.",
        error=ContractError,
    ),
    "HW036": Fault(
        title="Unknown hook",
        what=_WHO + " cannot be registered:",
        why="{problems}.",
        next="Ask its author, or block it: `BEDPLATE_PLUGINS=-{name}`.",
        error=ContractError,
    ),
    "HW040": Fault(
        title="A plugin raises at import",
        what=_WHO + " failed while importing {value}: {cause}.",
        why="Last frames: {frames}. Other plugins are not affected; start-up goes on unless "
        "this one is asked for.",
        next="To go on without it: `BEDPLATE_PLUGINS=-{name}`; to see more: "
        "`bedplate doctor --backend {name}`.",
    ),
    "HW041": Fault(
        title="A plugin raises in a hook",
        what=_WHO + " failed in {hook}: {cause}.",
        why="Asked with {request}.{explanation}",
        next="Report it to {report}; for the facts: `bedplate doctor --backend {name}`.",
    ),
    "HW042": Fault(
        title="Heavy import",
        what="Importing {value} ({distribution}) {problem}.",
        why="Start-up and `bedplate --help` pay for it even when the plugin is not used.",
        next="Its author moves heavy imports into bedplate_activate; to go without: "
        "`BEDPLATE_PLUGINS=-{name}`.",
        error=ContractError,
    ),
    "HW043": Fault(
        title="Device context created too early",
        what="bedplate_probe of '{name}' ({distribution}) initialised a device context.",
        why="A process with a device context cannot be forked.",
        next="Its author makes the probe lighter; to go without: `BEDPLATE_PLUGINS=-{name}`.",
        error=ContractError,
    ),
    "HW044": Fault(
        title="A hook's answer breaks the contract",
        what=_WHO + " gave an answer in {hook} that breaks the contract:",
        why="{problems}.",
        next="Report it to {report}; for the facts: `bedplate doctor --backend {name}`.",
        error=ContractError,
    ),
    "HW045": Fault(
        title="A hook was called after sealing",
        what="{hook} was called after the backend was bound.",
        why="Hooks belong to start-up; afterwards the core uses the bound record only.",
        next="This is a mistake in the caller; please report it with the output of "
        "`bedplate explain --json`.",
        error=ContractError,
    ),
    "HW050": Fault(
        title="Ambiguous automatic choice",
        what="{names} fit equally well (score {score}).",
        why="Choosing one of them would be a guess.",
        next="Choose yourself: `--backend {first}`.",
    ),
    "HW051": Fault(
        title="Automatic choice would downgrade",
        what="{present}, so 'auto' refuses to continue on '{fallback}'.",
        why="Slower than the machine allows, in silence, is never what was asked for.",
        next="Mend it (`bedplate doctor`), or allow it: `--backend {fallback}`.",
    ),
    "HW060": Fault(
        title="No provider supports what is needed",
        what="No provider for {what} on '{backend}'.",
        why="{reasons}.",
        next="{remedy} For every candidate: `bedplate explain`.",
        error=UnsupportedError,
    ),
})  # fmt: skip
