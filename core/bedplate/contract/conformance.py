# SPDX-License-Identifier: Apache-2.0
"""What a backend tells the conformance kit about itself: wider tolerances and known gaps.

Pure data, answered by the hook ``bedplate_conformance_profile``.  Checks are named by patterns
over their identifiers, as the report prints them: ``L2/linear/*``, where ``*`` is any text.
"""

from __future__ import annotations

__all__ = ["ConformanceProfile", "KnownGap", "WiderTolerance"]

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownGap:
    """Checks that fail for a reason that somebody is working on.

    Attributes:
        checks: Pattern over identifiers of checks.
        reason: What is wrong, in a sentence.
        link: Where the work is followed.
        expires: Last day on which the gap excuses, ``YYYY-MM-DD``; afterwards it fails.
    """

    checks: str
    reason: str
    link: str
    expires: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WiderTolerance:
    """Checks whose numbers may be further from the reference than usual.

    Attributes:
        checks: Pattern over identifiers of checks.
        factor: What their tolerance is multiplied by, above 1.
        reason: Why the device cannot be closer; the report prints it.
    """

    checks: str
    factor: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConformanceProfile:
    """A backend's own words about its conformance; empty means that it needs no leniency.

    Attributes:
        tolerances: Where its numbers are allowed to differ more.
        gaps: What is known not to work yet.
    """

    tolerances: tuple[WiderTolerance, ...] = ()
    gaps: tuple[KnownGap, ...] = ()
