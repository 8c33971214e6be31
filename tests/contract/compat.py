# SPDX-License-Identifier: Apache-2.0
"""What would break plugins between two descriptions of the contract."""

from __future__ import annotations

__all__ = ["breaks"]

import re
from typing import Any

_IMPLEMENTED = "(required)"


def breaks(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Everything of ``old`` that is gone, and everything that ``new`` demands besides.

    Args:
        old: As ``tests.contract.snapshot.describe`` gave it when plugins were built.
        new: The same, now.
    """
    found = [f"hook {name} is gone" for name in old["hooks"] if name not in new["hooks"]]
    for name in set(old["hooks"]) & set(new["hooks"]):
        was, now = (_arguments(x["hooks"][name]["signature"]) for x in (old, new))
        found += [f"hook {name} lost its argument {a}" for a in was if a not in now]
    found += [f"{name} is gone" for name in old["public"] if name not in new["public"]]
    for name in set(old["public"]) & set(new["public"]):
        if isinstance(old["public"][name], dict):
            found += _member_breaks(name, old["public"][name], new["public"][name])
    return sorted(found)


def _member_breaks(name: str, old: dict[str, str], new: Any) -> list[str]:
    if not isinstance(new, dict):
        return [f"{name} is no class any more"]
    found = [f"{name}.{member} is gone" for member in old if member not in new]
    for member, text in new.items():
        was = old.get(member)
        if was is None and (_IMPLEMENTED in text or _is_bare_field(text)):
            found.append(f"{name}.{member} is new and must be given")
        elif was is not None and _IMPLEMENTED in text and _IMPLEMENTED not in was:
            found.append(f"{name}.{member} has become required")
        elif was is not None and " = " in was and _is_bare_field(text):
            found.append(f"{name}.{member} has lost its default")
        elif was is not None and was.startswith("("):
            lost = [a for a in _arguments(was) if a not in _arguments(text)]
            found += [f"{name}.{member} lost its argument {a}" for a in lost]
    return found


def _is_bare_field(text: str) -> bool:
    """A field without a default; methods and properties have parentheses of arguments."""
    return " = " not in text and not re.match(r"(property)?\(", text)


def _arguments(signature: str) -> list[str]:
    inside = signature[1 : signature.rindex(")")]
    return re.findall(r"(?:^|, )\*{0,2}(\w+)(?=[:,=]|$| =)", inside)
