# SPDX-License-Identifier: Apache-2.0
"""What the simulated device is asked to be: schedule, memory, capabilities, faults.

From ``backend_options.sim`` of the settings, else from ``BEDPLATE_SIM=name=value,…``.
"""

from __future__ import annotations

__all__ = ["FAULTS", "SCHEDULES", "Options", "read_options"]

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from bedplate.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEDULES = ("eager", "lazy", "random", "threaded")
FAULTS = ("allocation", "capture", "replay", "launch")
"""What can be made to fail, at the n-th time from start-up on."""

_VARIABLE = "BEDPLATE_SIM"
_MEMORY = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One simulated device.

    Attributes:
        schedule: When queued work runs: ``eager`` at once, ``lazy`` when it is waited for,
            ``random`` some of it now and then, ``threaded`` by a thread for each stream.
        seed: Of the ``random`` schedule.
        memory: Bytes of device memory.
        graphs: Whether it has graphs.
        sampling_inside: Whether a graph may hold the sampling, too.
        asynchronous: Whether the core may plan a step while the one before it runs.
        compute_dtypes: Names joined by ``+``, best first.
        page_sizes: The same for tokens a page.
        index_dtype: Of slots.
        host_reads: ``force``: ``.item()`` and the like wait for the device; ``refuse``: they
            are an error once start-up is over.
        fail_allocation: The n-th allocation finds no memory; 0 = never.
        fail_capture: The n-th capture fails.
        fail_replay: The n-th replay fails.
        fail_launch: The device is lost at the n-th piece of work.
        event_delay_ms: How much later than the work before it an event is seen.
    """

    schedule: str = "lazy"
    seed: int = 0
    memory: int = _MEMORY
    graphs: bool = True
    sampling_inside: bool = True
    asynchronous: bool = True
    compute_dtypes: str = "float32+bfloat16+float16"
    page_sizes: str = "16+1+8+32+64"
    index_dtype: str = "int32"
    host_reads: str = "force"
    fail_allocation: int = 0
    fail_capture: int = 0
    fail_replay: int = 0
    fail_launch: int = 0
    event_delay_ms: int = 0


_ALLOWED = {
    "schedule": SCHEDULES,
    "index_dtype": ("int32", "int64"),
    "host_reads": ("force", "refuse"),
}


def read_options(given: Mapping[str, Any], environment: Mapping[str, str]) -> Options:
    """Options of the settings; those that they lack, of the environment.

    Raises:
        ConfigError: A name or a value is wrong.
    """
    values = {**_from_text(environment.get(_VARIABLE, "")), **given}
    known = {field.name for field in fields(Options)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            f"Backend 'sim' has no option {', '.join(unknown)}; it has: "
            f"{', '.join(sorted(known))}. Correct backend_options.sim or {_VARIABLE}"
        )
    types = get_type_hints(Options)
    return Options(**{name: _value(name, value, types[name]) for name, value in values.items()})


def _from_text(text: str) -> dict[str, str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return {name.strip(): value.strip() for name, _, value in (p.partition("=") for p in parts)}


def _value(name: str, given: Any, kind: type) -> Any:
    value = given
    if kind is str:
        value = "+".join(map(str, given)) if isinstance(given, list | tuple) else str(given)
    elif isinstance(given, str):
        value = _number(given)
    allowed = _ALLOWED.get(name)
    negative = kind is int and isinstance(value, int) and value < 0
    if type(value) is not kind or negative or (allowed is not None and value not in allowed):
        forms = {int: "an integer from 0 on", bool: "true or false", str: "text"}
        raise ConfigError(
            f"Option {name} of backend 'sim' is {given!r}, but must be "
            f"{' or '.join(allowed) if allowed else forms[kind]}"
        )
    return value


def _number(text: str) -> Any:
    words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    return int(text) if text.isdecimal() else text
