# SPDX-License-Identifier: Apache-2.0
"""DecisionLog: every choice made at start-up, counted where it is made.

Whoever is about to choose says so with ``expect`` and answers with ``record``; whatever was
announced and not answered, or answered and not announced, is in ``unexplained``.  So a choice
without a record, and a record without a choice, both show.
"""

from __future__ import annotations

__all__ = ["CHOICE_POINTS", "DecisionLog", "Unexplained"]

import logging
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bedplate.contract.decisions import Decision

_log = logging.getLogger(__name__)

CHOICE_POINTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "backend": "which backend runs the engine",
        "pack.*": "whether an override pack takes part",
        "override.*": "whether what a pack offers keeps its place, by numbers and by time",
        "config.*": "whether a setting that nobody gave follows the backend's proposal",
        "op.*": "which implementation of an operation is used",
        "attention": "which attention implementation is used",
    }
)
"""Points chosen in this package, and where its choices are tried on a model: name, with ``*``
for the open part, and its question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unexplained:
    """Choices and records that do not match; false when all do.

    Attributes:
        missing: Points announced without a decision, once per lack.
        unexpected: Points decided without an announcement, once per surplus.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected)


class DecisionLog:
    """Decisions in the order in which they were made."""

    def __init__(self) -> None:
        self._expected: Counter[str] = Counter()
        self._decisions: list[Decision] = []
        self._observers: list[Callable[[Decision], object]] = []

    def expect(self, *points: str) -> None:
        """Announce one choice at each of ``points``."""
        self._expected.update(points)

    def record(self, decision: Decision) -> None:
        """Keep a decision and tell the observers; one that raises is not told again."""
        self._decisions.append(decision)
        for observer in tuple(self._observers):
            self._tell(observer, decision)

    @contextmanager
    def choosing(self, point: str) -> Iterator[Callable[[Decision], None]]:
        """Announce one choice; the block must call what it gets with the decision.

        A block that raises without deciding stays visible in ``unexplained``.
        """
        self.expect(point)
        yield self.record

    def subscribe(self, observer: Callable[[Decision], object]) -> None:
        """Tell ``observer`` all decisions, the ones made before included."""
        self._observers.append(observer)
        for decision in tuple(self._decisions):
            if observer in self._observers:
                self._tell(observer, decision)

    def points(self) -> tuple[str, ...]:
        """Points of all decisions, in order, repeated where chosen repeatedly."""
        return tuple(decision.point for decision in self._decisions)

    def unexplained(self) -> Unexplained:
        """Announced but undecided points, and the reverse."""
        made = Counter(self.points())
        return Unexplained(
            missing=tuple(sorted((self._expected - made).elements())),
            unexpected=tuple(sorted((made - self._expected).elements())),
        )

    def to_json(self) -> list[dict[str, Any]]:
        """One object per decision: point, chosen, candidates, detail."""
        return [
            {
                "point": decision.point,
                "chosen": decision.chosen,
                "candidates": [
                    {"name": c.name, "verdict": c.verdict, "reason": c.reason}
                    for c in decision.candidates
                ],
                "detail": dict(decision.detail),
            }
            for decision in self._decisions
        ]

    def __iter__(self) -> Iterator[Decision]:
        return iter(tuple(self._decisions))

    def __len__(self) -> int:
        return len(self._decisions)

    def _tell(self, observer: Callable[[Decision], object], decision: Decision) -> None:
        try:
            observer(decision)
        except Exception:
            _log.exception("An observer of decisions raised; it is not told again")
            self._observers.remove(observer)
