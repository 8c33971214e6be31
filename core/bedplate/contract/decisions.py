# SPDX-License-Identifier: Apache-2.0
"""Verdicts and decisions: the records behind ``bedplate explain``.

Whoever chooses between candidates returns or logs one ``Decision`` with every candidate in
it.  ``supports(...)`` questions are answered with a ``Support``, which is true or false and
always carries a reason when false.
"""

from __future__ import annotations

__all__ = ["Candidate", "Decision", "Support", "Verdict"]

from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["chosen", "possible", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class Support:
    """Answer to a ``supports`` question; use it as a boolean.

    Attributes:
        ok: Whether the request can be served correctly.
        reason: Why not; may be empty when ``ok``.
    """

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok

    @staticmethod
    def yes(reason: str = "") -> Support:
        """The request can be served."""
        return Support(True, reason)

    @staticmethod
    def no(reason: str) -> Support:
        """The request cannot be served, because of ``reason``."""
        return Support(False, reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One possibility that was looked at.

    Attributes:
        name: What the user would call it.
        verdict: ``chosen``, ``possible`` (would have worked, not preferred), ``refused``
            (cannot, by its own word or by rule) or ``failed`` (should have worked, broke).
        reason: One sentence without a full stop.
    """

    name: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One choice made at start-up, with all its candidates.

    Attributes:
        point: The choice point, a dotted name such as ``backend``, ``attention``,
            ``op.rms_norm``, ``graph``, ``fusion.layers.0.mlp``.
        chosen: Name of what was taken, or ``None`` if nothing was.
        candidates: All that were looked at, in order of preference.
        detail: Numbers that the choice rests on, ready to print.
    """

    point: str
    chosen: str | None
    candidates: tuple[Candidate, ...]
    detail: dict[str, str] = field(default_factory=dict)
