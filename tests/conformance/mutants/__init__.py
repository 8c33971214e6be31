# SPDX-License-Identifier: Apache-2.0
"""Backends that are wrong on purpose: what the kit is worth is how many of them it finds.

``MUTANTS`` has all of them by name, and ``SURVIVORS`` those that are not found, each with the
reason.  A mutant is offered to the registry as any backend is: the entry point of a fake
distribution names an attribute of this module.
"""

from __future__ import annotations

from typing import Any

from tests.conformance.mutants import (
    attention,
    graphs,
    hygiene,
    operations,
    runtime,
    slots,
    whole,
)
from tests.conformance.mutants.base import Mutant, MutantBackend, mutant

MUTANTS: dict[str, Mutant] = {
    **hygiene.MUTANTS,
    **runtime.MUTANTS,
    **operations.MUTANTS,
    **attention.MUTANTS,
    **slots.MUTANTS,
    **graphs.MUTANTS,
    **whole.MUTANTS,
}
SOUND = mutant(8, "nothing is wrong")
SURVIVORS = {
    "explains_by_number": "the registry drops a sentence that is no text; users never see it",
    "one_ulp": "sums in another order move float32 results as far; the tolerance must allow it",
}


def __getattr__(name: str) -> Any:
    """The backend of that name, for an entry point."""
    if name == "sound":
        return MutantBackend(SOUND.parts)
    if name in MUTANTS:
        return MutantBackend(MUTANTS[name].parts)
    raise AttributeError(name)
