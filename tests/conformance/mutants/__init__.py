# SPDX-License-Identifier: Apache-2.0
"""Backends that are wrong on purpose: what the kit is worth is how many of them it finds.

``MUTANTS`` has all of them by name, and ``SURVIVORS`` those that are not found, each with the
reason.  A mutant is offered to the registry as any backend is: the entry point of a fake
distribution names an attribute of this module.
"""

from __future__ import annotations

import os
from dataclasses import replace
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

from bedplate.contract import Support

MUTANTS: dict[str, Mutant] = {
    **hygiene.MUTANTS,
    **runtime.MUTANTS,
    **operations.MUTANTS,
    **attention.MUTANTS,
    **slots.MUTANTS,
    **graphs.MUTANTS,
    **whole.MUTANTS,
}
OTHERS = {
    "sound": mutant(8, "nothing is wrong"),
    "narrow_cache": mutant(
        3, "nothing is wrong, over caches of eight bits", attention=attention.SharedCalls,
        supports=lambda _request: Support.yes(),
        capabilities=lambda c: replace(
            c, kv_dtypes=(*c.kv_dtypes, "float8_e5m2", "float8_e4m3fn")
        ),
    ),
    "aborts": mutant(2, "ends the process", ops={"linear": lambda *_, **__: os.abort()}),
    "refuses_what_it_can": mutant(
        3, "refuses windows without need", supports=lambda request: Support(
            all(call.window is None for call in request.calls), "no windows"
        ),
    ),
}  # fmt: skip
"""For tests of the kit; none is a mistake that a check has to find."""
SURVIVORS = {
    "explains_by_number": "the registry drops a sentence that is no text; users never see it",
    "one_ulp": "sums in another order move float32 results as far; the tolerance must allow it",
}


def __getattr__(name: str) -> Any:
    """The backend of that name, for an entry point."""
    known = MUTANTS | OTHERS
    if name in known:
        return MutantBackend(known[name].parts)
    raise AttributeError(name)
