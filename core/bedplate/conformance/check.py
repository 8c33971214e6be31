# SPDX-License-Identifier: Apache-2.0
"""A check and its result: what levels are made of.

A check is a function that raises when the backend is wrong, beside what the backend says about
the thing checked.  What it says decides how the outcome is called: declared and working is
``passed``, declared and broken ``failed``, undeclared and working ``surplus``, undeclared and
not working ``not declared``.
"""

from __future__ import annotations

__all__ = ["OUTCOMES", "Check", "Leave", "Outcome", "Result", "Wrong", "matching", "require"]

from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, get_args

from bedplate.contract.decisions import Support

if TYPE_CHECKING:
    from collections.abc import Callable

    from bedplate.conformance.subject import Subject

Outcome = Literal["passed", "failed", "not declared", "known gap", "surplus"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class Wrong(AssertionError):  # noqa: N818 - reads as what it says
    """The backend is wrong; the message says in what."""


class Leave(Exception):  # noqa: N818 - not an error, but a way out
    """The check does not apply here; the message names what is missing."""


def matching(text: str, pattern: str) -> bool:
    """Whether an identifier fits a pattern, in which ``*`` is any text."""
    return fnmatchcase(text, pattern.replace("[", "[[]"))


def require(truth: object, message: str) -> None:
    """Raise ``Wrong`` with the message unless ``truth``."""
    if not truth:
        raise Wrong(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question to a backend.

    Attributes:
        level: 0 to 8.
        name: Unique within the level; parts are separated by slashes, without blanks.
        run: Raises ``Wrong``, or anything, when the backend is wrong. May return numbers to
            report, such as ``{"ratio": 1.2}``.
        declared: What the backend says about the thing; a no carries its reason.
        attempt: Whether to run it even though it is not declared, to find a surplus.
    """

    level: int
    name: str
    run: Callable[[Subject], dict[str, float] | None]
    declared: Support = field(default_factory=Support.yes)
    attempt: bool = True

    @property
    def id(self) -> str:
        """Identifier in reports and patterns."""
        return f"L{self.level}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of a check.

    Attributes:
        check: Identifier.
        outcome: One of five.
        reason: Why it is not ``passed``, in a sentence; of a gap with its link and last day.
        reproducer: Command that runs this check alone.
        seconds: How long it took.
        numbers: What the check measured.
    """

    check: str
    outcome: Outcome
    reason: str = ""
    reproducer: str = ""
    seconds: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def level(self) -> int:
        """0 to 8."""
        return int(self.check[1])

    def to_json(self) -> dict[str, Any]:
        """As an object of the report."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """The inverse of ``to_json``."""
        return cls(**data)
