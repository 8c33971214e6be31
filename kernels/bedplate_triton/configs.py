# SPDX-License-Identifier: Apache-2.0
"""Launch sizes of kernels, read from the JSON files beside this module; nothing is tuned here.

A file ``configs/ARCH/OP.json`` holds defaults and rules for one operation on one architecture.
The folder is found by the most specific name: ``ARCH@DEVICE``, ``ARCH``, ``FAMILY``, then
``default``; its files count as a whole, so a rule of another folder never mixes in.  Sizes that
would not fit the device are refused, and those of the next folder taken; ``refusals`` has the
record.  ``benchmarks.tune`` writes the files, with where and when they were measured.
"""

from __future__ import annotations

__all__ = ["ConfigFile", "choose", "find", "override", "refusals"]

import json
import logging
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bedplate.contract.decisions import Candidate, Decision
from bedplate.errors import ContractError, UnsupportedError
from bedplate_triton import fit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from bedplate_triton.features import Features

SCHEMA = 1

_log = logging.getLogger(__name__)
_overrides: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = []
_refusals: list[Decision] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """One file.

    Attributes:
        folder: Where it lies: architecture, with or without a device.
        op: The operation.
        default: Values where no rule says otherwise.
        rules: (conditions, values), the first that holds wins for each value.
        provenance: How, where and when the values were found.
    """

    folder: str
    op: str
    default: Mapping[str, Any]
    rules: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
    provenance: Mapping[str, Any]

    def choose(self, key: Mapping[str, Any]) -> dict[str, Any]:
        """Values for one use.

        Args:
            key: Facts of the use. A condition ``size`` asks for equality, ``size_le`` for at
                most and ``size_ge`` for at least.
        """
        chosen: dict[str, Any] = {}
        for when, values in self.rules:
            if _all_hold(when, key):
                chosen = {**values, **chosen}
        return {**self.default, **chosen}


@contextmanager
def override(
    op: str, when: Mapping[str, Any] = MappingProxyType({}), **values: Any
) -> Iterator[None]:
    """Let ``choose`` give these values for ``op`` in a block: for who measures them.

    Args:
        op: Name of the operation.
        when: Conditions, as in a rule of a file; of several blocks the innermost wins.
        values: Instead of those of the files.
    """
    _overrides.append((op, when, values))
    try:
        yield
    finally:
        _overrides.pop()


def choose(op: str, features: Features, **key: Any) -> Mapping[str, Any]:
    """Launch sizes of ``op`` on a device; remembered, so quick after the first time.

    Args:
        op: Name of the operation, as its file is called.
        features: The device.
        key: Facts that rules ask for: constants of the model and classes of sizes, never a
            length.

    Raises:
        UnsupportedError: No folder has sizes that fit the device.
    """
    chosen = _chosen(op, features, **key)
    for name, when, values in _overrides:
        if name == op and _all_hold(when, key):
            chosen = {**chosen, **values}
    return chosen


def refusals() -> tuple[Decision, ...]:
    """Every choice so far in which some sizes did not fit, in order."""
    return tuple(_refusals)


@lru_cache(maxsize=4096)
def _chosen(op: str, features: Features, **key: Any) -> Mapping[str, Any]:
    judged = [
        (file, sizes, fit.refusal(op, sizes, key, features))
        for file in _files(op, features.arch, features.device, features.family)
        for sizes in (file.choose(key),)
    ]
    place = _first_that_fits(op, judged, key, features)
    refused = [
        Candidate(name=file.folder, verdict="refused", reason=reason)
        for file, _sizes, reason in judged[:place]
    ]
    if place is None:
        reasons = "; ".join(f"{each.name}: {each.reason}" for each in refused)
        raise UnsupportedError(
            f"no launch sizes of '{op}' fit this device ({reasons}); add rules to a file of "
            f"configs/ for {_facts(key)}, or choose another implementation"
        )
    file, sizes, _reason = judged[place]
    if refused:
        _note(op, key, refused, file.folder)
    return MappingProxyType(sizes)


def _first_that_fits(
    op: str,
    judged: Sequence[tuple[ConfigFile, Mapping[str, Any], str]],
    key: Mapping[str, Any],
    features: Features,
) -> int | None:
    """Its place; where none surely fits, of the first that may; ``None`` if none can."""
    for surely in (True, False):
        for place, (_file, sizes, _reason) in enumerate(judged):
            if not fit.refusal(op, sizes, key, features, surely=surely):
                return place
    return None


def _note(op: str, key: Mapping[str, Any], refused: list[Candidate], folder: str) -> None:
    taken = Candidate(name=folder, verdict="chosen", reason="the next that fits")
    detail = {name: str(value) for name, value in key.items()}
    decision = Decision(
        point=f"sizes.{op}", chosen=folder, candidates=(*refused, taken), detail=detail
    )
    if decision not in _refusals:
        _refusals.append(decision)
    _log.warning(
        "launch sizes of %s in configs/%s are not used for %s: %s; those of %s are",
        op, refused[0].name, _facts(key), refused[0].reason, folder,
    )  # fmt: skip


def _facts(key: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in key.items())


def find(op: str, arch: str, device: str = "", family: str = "") -> ConfigFile:
    """The file that is asked first.

    Raises:
        ContractError: There is none, not even a default, or it is malformed.
    """
    return _files(op, arch, device, family)[0]


@lru_cache(maxsize=256)
def _files(op: str, arch: str, device: str, family: str) -> tuple[ConfigFile, ...]:
    """The files of an operation for a device, most specific first."""
    names = [f"{arch}@{_word(device)}", arch, family, "default"]
    root = resources.files("bedplate_triton") / "configs"
    paths = {name: root / name / f"{op}.json" for name in names if name}
    found = tuple(
        _read(name, op, path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.is_file()
    )
    if not found:
        raise ContractError(
            f"no configuration for '{op}': looked in {', '.join(paths)}; every operation needs "
            "a file in configs/default"
        )
    return found


def _read(folder: str, op: str, text: str) -> ConfigFile:
    where = f"configs/{folder}/{op}.json"
    try:
        data = json.loads(text)
        head = (data["schema"], data["op"])
        file = ConfigFile(
            folder=folder,
            op=op,
            default=data["default"],
            rules=[(rule["when"], rule["set"]) for rule in data.get("rules", ())],
            provenance=data["provenance"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ContractError(
            f"{where} cannot be used: {error!r}; see kernels/README.md"
        ) from error
    if head != (SCHEMA, op):
        raise ContractError(f"{where} is of schema and operation {head}, not {(SCHEMA, op)}")
    return file


def _all_hold(when: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    return all(_holds(condition, wanted, key) for condition, wanted in when.items())


def _holds(condition: str, wanted: Any, key: Mapping[str, Any]) -> bool:
    name, _, relation = condition.rpartition("_")
    if relation in ("le", "ge") and name in key:
        return bool(key[name] <= wanted if relation == "le" else key[name] >= wanted)
    return condition in key and bool(key[condition] == wanted)


def _word(device: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", device)
