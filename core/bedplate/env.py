# SPDX-License-Identifier: Apache-2.0
"""Every environment variable of Bedplate: name, type, default, sentence.

The only module of the core that reads ``os.environ``.  A variable is read when it is asked
for, not at import, so that tests and long-lived programs see the current value.
"""

from __future__ import annotations

__all__ = [
    "BACKEND",
    "CONFIG",
    "DEBUG",
    "FUEL",
    "FUEL_FILE",
    "PLUGINS",
    "VARIABLES",
    "PluginFilter",
    "Variable",
    "environment",
    "set_plugins",
    "unknown_variables",
    "with_fuel",
]

import os
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from bedplate.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")
PREFIX: Final = "BEDPLATE_"


def environment() -> Mapping[str, str]:
    """The process environment, read-only and live."""
    return MappingProxyType(os.environ)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable(Generic[T]):
    """One environment variable.

    Attributes:
        name: Full name.
        sentence: What it does.
        forms: Allowed values, as shown in errors and documentation.
        default: Value when unset or empty.
        parse: Turns text into a value; raises ``ValueError`` on anything else.
    """

    name: str
    sentence: str
    forms: str
    default: T
    parse: Callable[[str], T]

    def get(self, environ: Mapping[str, str] | None = None) -> T:
        """The value now.

        Args:
            environ: Where to look; the process environment when not given.

        Raises:
            ConfigError: The text is none of ``forms``.
        """
        text = (environment() if environ is None else environ).get(self.name, "").strip()
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            because = f" ({error})" if str(error) else ""
            raise ConfigError(
                f"Environment variable {self.name} is {text!r}{because}; "
                f"allowed: {self.forms}. Correct it or unset it.",
                variable=self.name,
                value=text,
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginFilter:
    """Which plugins may load.

    Attributes:
        allow: Names that may load from outside the distribution ``bedplate``; ``None`` = all.
        block: (name, distribution) that may not; distribution ``None`` = any.
    """

    allow: frozenset[str] | None = None
    block: frozenset[tuple[str, str | None]] = frozenset()

    def refusal(self, name: str, distribution: str, *, home: bool) -> str | None:
        """Why this plugin may not load, or ``None``.

        Args:
            name: Entry-point name.
            distribution: Normalised name of its distribution.
            home: Whether it comes from ``bedplate`` itself, which an allow-list never
                excludes.
        """
        for blocked, where in self.block:
            if blocked == name and where in (None, distribution):
                return f"blocked by BEDPLATE_PLUGINS=-{name}" + (f"@{where}" if where else "")
        if self.allow is None or home or name in self.allow:
            return None
        if not self.allow:
            return "no plugins from outside bedplate were allowed"
        return f"BEDPLATE_PLUGINS allows only {', '.join(sorted(self.allow))}"


_ITEM = re.compile(r"(-?)([a-z][a-z0-9_]*)(?:@([A-Za-z0-9][A-Za-z0-9._-]*))?")


def _plugin_filter(text: str) -> PluginFilter:
    allow, block, nothing = set(), set(), False
    for item in (part.strip() for part in text.split(",") if part.strip()):
        match = _ITEM.fullmatch(item)
        if match is None or (match[3] and not match[1]):
            raise ValueError(f"cannot read {item!r}")
        if match[1]:
            where = re.sub(r"[-_.]+", "-", match[3]).lower() if match[3] else None
            block.add((match[2], where))
        elif match[2] == "none":
            nothing = True
        else:
            allow.add(match[2])
    if nothing and allow:
        raise ValueError("'none' cannot stand beside other names")
    restricted = nothing or bool(allow)
    return PluginFilter(allow=frozenset(allow) if restricted else None, block=frozenset(block))


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError
    return int(text)


def _switch(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True,
             "0": False, "false": False, "no": False, "off": False}  # fmt: skip
    try:
        return words[text.lower()]
    except KeyError:
        raise ValueError from None


BACKEND: Final[Variable[str | None]] = Variable(
    name="BEDPLATE_BACKEND",
    sentence="Backend to use when none is named by an argument or option.",
    forms="auto, NAME, NAME:INDEX, or a comma-separated order of preference",
    default=None,
    parse=str,
)
CONFIG: Final[Variable[str | None]] = Variable(
    name="BEDPLATE_CONFIG",
    sentence="Configuration file (TOML); no other place is looked at.",
    forms="path of a file",
    default=None,
    parse=str,
)
PLUGINS: Final[Variable[PluginFilter]] = Variable(
    name="BEDPLATE_PLUGINS",
    sentence="Plugins from outside bedplate that may load; bedplate's own always may, "
    "unless blocked.",
    forms="NAME,… (only these), -NAME or -NAME@DISTRIBUTION (not these), none",
    default=PluginFilter(),
    parse=_plugin_filter,
)
DEBUG: Final[Variable[bool]] = Variable(
    name="BEDPLATE_DEBUG",
    sentence="Tracebacks on the command line.",
    forms="1, true, yes, on, 0, false, no, off",
    default=False,
    parse=_switch,
)
FUEL: Final[Variable[int | None]] = Variable(
    name="BEDPLATE_FUEL",
    sentence="Most kernels that may replace plain torch; the others are left out, the last "
    "taken first. `bedplate bisect-kernels` sets it.",
    forms="an integer from 0",
    default=None,
    parse=_count,
)
FUEL_FILE: Final[Variable[str | None]] = Variable(
    name="BEDPLATE_FUEL_FILE",
    sentence="File that gets one line for each kernel, in the order that BEDPLATE_FUEL counts.",
    forms="path of a file",
    default=None,
    parse=str,
)

VARIABLES: Final[Mapping[str, Variable[object]]] = MappingProxyType(
    {
        variable.name: variable  # type: ignore[misc]
        for variable in (BACKEND, CONFIG, PLUGINS, DEBUG, FUEL, FUEL_FILE)
    }
)


def set_plugins(text: str) -> None:
    """Set ``BEDPLATE_PLUGINS`` for this process and its children."""
    os.environ[PLUGINS.name] = text


def with_fuel(limit: int | None, file: str) -> dict[str, str]:
    """The environment of a child process that may use so many kernels and lists them."""
    inherited = {name: text for name, text in os.environ.items() if name != FUEL.name}
    return (
        inherited | ({} if limit is None else {FUEL.name: str(limit)}) | {FUEL_FILE.name: file}
    )


def unknown_variables(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Set variables that carry our prefix and are not ours; a plugin's own, or a typo."""
    names = environment() if environ is None else environ
    return tuple(sorted(n for n in names if n.startswith(PREFIX) and n not in VARIABLES))
