# SPDX-License-Identifier: Apache-2.0
"""Ask candidates one after the other, and keep every answer.

Shared by operations and attention.  A ``supports`` that raises, or answers with something
else than ``Support``, makes its candidate ``failed``; it never stops the choice.
"""

from __future__ import annotations

__all__ = ["ask_support", "promises", "refusing"]

from typing import TYPE_CHECKING, TypeVar

from bedplate.contract.capabilities import DETERMINISM_CLASSES
from bedplate.contract.decisions import Candidate, Support, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bedplate.contract.capabilities import DeterminismClass

Request = TypeVar("Request")


def ask_support(
    ranked: Sequence[tuple[str, Callable[[Request], Support]]], request: Request
) -> tuple[int | None, tuple[Candidate, ...]]:
    """Index of the first candidate that supports ``request``, and a verdict on each.

    Args:
        ranked: (name, question), best first.
        request: What is asked.
    """
    chosen: int | None = None
    candidates = []
    for index, (name, supports) in enumerate(ranked):
        candidate = _ask(name, supports, request)
        if candidate.verdict == "possible":
            verdict: Verdict = "possible" if chosen is not None else "chosen"
            chosen = index if chosen is None else chosen
            default = f"'{ranked[chosen][0]}' is the best that supports the request"
            reason = candidate.reason or default
            candidate = Candidate(name=name, verdict=verdict, reason=reason)
        candidates.append(candidate)
    return chosen, tuple(candidates)


def promises(
    supports: Callable[[Request], Support], given: DeterminismClass, wanted: DeterminismClass
) -> Callable[[Request], Support]:
    """The question, with a no in advance for a promise that is weaker than what is wanted."""
    order = DETERMINISM_CLASSES.index
    if order(given) >= order(wanted):
        return supports
    return refusing(f"promises {given}, and {wanted} is asked for")


def refusing(reason: str) -> Callable[[Request], Support]:
    """A question that is answered with no."""
    return lambda _request: Support.no(reason)


def _ask(name: str, supports: Callable[[Request], Support], request: Request) -> Candidate:
    try:
        answer = supports(request)
    except Exception as error:
        reason = f"supports() raised {type(error).__name__}: {error}"
        return Candidate(name=name, verdict="failed", reason=reason)
    if not isinstance(answer, Support):
        kind = type(answer).__name__
        return Candidate(name=name, verdict="failed", reason=f"supports() gave {kind}")
    verdict: Verdict = "possible" if answer.ok else "refused"
    reason = answer.reason or ("" if answer.ok else "it gave no reason")
    return Candidate(name=name, verdict=verdict, reason=reason)
