# SPDX-License-Identifier: Apache-2.0
"""Describe the contract as data: ``python tests/contract/snapshot.py`` writes the snapshot."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

from bedplate import contract
from bedplate.contract.hooks import BedplateHooks

FILE = Path(__file__).with_name("contract.json")


def describe() -> dict[str, Any]:
    """API version, hooks with signatures, and every public name with its members."""
    hooks = {name: f for name, f in vars(BedplateHooks).items() if name.startswith("bedplate_")}
    return {
        "api": list(contract.API_VERSION),
        "hooks": {name: _hook(function) for name, function in hooks.items()},
        "public": {name: _public(getattr(contract, name)) for name in contract.__all__},
    }


def _hook(function: Any) -> dict[str, Any]:
    options = function.bedplate_spec
    return {"signature": _signature(function), "firstresult": bool(options["firstresult"])}


def _public(value: Any) -> Any:
    if not inspect.isclass(value):
        return type(value).__name__
    if dataclasses.is_dataclass(value):
        return {field.name: _field(field) for field in dataclasses.fields(value)} | _methods(
            value
        )
    return _methods(value)


def _field(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        return f"{field.type} = {_default(field.default)}"
    if field.default_factory is not dataclasses.MISSING:
        return f"{field.type} = {field.default_factory.__name__}()"
    return str(field.type)


def _default(value: Any) -> str:
    return value.__name__ if inspect.isroutine(value) else repr(value)


def _methods(value: Any) -> dict[str, str]:
    found = {}
    for name, member in vars(value).items():
        if name.startswith("_"):
            continue
        required = " (required)" if getattr(member, "__isabstractmethod__", False) else ""
        if isinstance(member, property):
            found[name] = "property" + _signature(member.fget) + required
        elif isinstance(member, staticmethod) or inspect.isfunction(member):
            found[name] = _signature(getattr(value, name)) + required
    return found


def _signature(function: Any) -> str:
    return str(inspect.signature(function)).replace("'", "")


def text() -> str:
    """The snapshot as it is committed."""
    return json.dumps(describe(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
