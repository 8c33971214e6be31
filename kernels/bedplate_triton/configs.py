# SPDX-License-Identifier: Apache-2.0
"""Launch sizes of kernels, read from the JSON files beside this module; nothing is tuned here.

A file ``configs/ARCH/OP.json`` holds defaults and rules for one operation on one architecture.
The folder is found by the most specific name: ``ARCH@DEVICE``, ``ARCH``, then ``default``; its
files count as a whole, so a rule of another folder never mixes in.  ``benchmarks.tune`` writes
them, with where and when they were measured.
"""

from __future__ import annotations

__all__ = ["ConfigFile", "choose", "find", "override"]

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bedplate.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from bedplate_triton.features import Features

SCHEMA = 1

_overrides: dict[str, dict[str, Any]] = {}


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
            if all(_holds(condition, wanted, key) for condition, wanted in when.items()):
                chosen = {**values, **chosen}
        return {**self.default, **chosen}


@contextmanager
def override(op: str, **values: Any) -> Iterator[None]:
    """Let ``choose`` give these values for ``op`` in a block: for who measures them."""
    before = _overrides.get(op)
    _overrides[op] = values
    try:
        yield
    finally:
        if before is None:
            del _overrides[op]
        else:
            _overrides[op] = before


def choose(op: str, features: Features, **key: Any) -> Mapping[str, Any]:
    """Launch sizes of ``op`` on a device; remembered, so quick after the first time.

    Args:
        op: Name of the operation, as its file is called.
        features: The device.
        key: Facts that rules ask for: constants of the model and classes of sizes, never a
            length.
    """
    chosen = _chosen(op, features.arch, features.device, **key)
    return {**chosen, **_overrides[op]} if op in _overrides else chosen


@lru_cache(maxsize=4096)
def _chosen(op: str, arch: str, device: str, **key: Any) -> Mapping[str, Any]:
    return MappingProxyType(find(op, arch, device).choose(key))


@lru_cache(maxsize=256)
def find(op: str, arch: str, device: str = "") -> ConfigFile:
    """The file that decides.

    Raises:
        ContractError: There is none, not even a default, or it is malformed.
    """
    names = [f"{arch}@{_word(device)}", arch, "default"]
    root = resources.files("bedplate_triton") / "configs"
    for name in names:
        path = root / name / f"{op}.json"
        if name and path.is_file():
            return _read(name, op, path.read_text(encoding="utf-8"))
    raise ContractError(
        f"no configuration for '{op}': looked in {', '.join(filter(None, names))}; every "
        "operation needs a file in configs/default"
    )


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


def _holds(condition: str, wanted: Any, key: Mapping[str, Any]) -> bool:
    name, _, relation = condition.rpartition("_")
    if relation in ("le", "ge") and name in key:
        return bool(key[name] <= wanted if relation == "le" else key[name] >= wanted)
    return condition in key and bool(key[condition] == wanted)


def _word(device: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", device)
