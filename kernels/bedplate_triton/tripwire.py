# SPDX-License-Identifier: Apache-2.0
"""Who compiles while requests wait: a record of every kernel made ready after warm-up.

A compile takes as long as a hundred decode steps, and one that comes from a size nobody thought
of comes back with the next such size.  So a backend arms the wire when warm-up is over: later
compiles are logged and kept, and tests refuse them.  A kernel that lies in the disk's cache is
ready sooner, and is noted all the same: on another machine it would not lie there.
"""

from __future__ import annotations

__all__ = ["LateKernel", "Tripwire", "tripwire"]

import logging
from dataclasses import dataclass
from typing import Any

import triton

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LateKernel:
    """One kernel that was made ready too late.

    Attributes:
        kernel: Its name.
        facts: Types and constants that it was made for.
        compiled: Whether it was compiled, and not found in the disk's cache.
    """

    kernel: str
    facts: str
    compiled: bool


class Tripwire:
    """Listens to Triton's compiler from the first ``arm`` on; so does whoever listened before.

    Attributes:
        tripped: What came since the wire was armed, in order.
    """

    def __init__(self) -> None:
        self.tripped: list[LateKernel] = []
        self._armed = False
        self._attached = False

    def arm(self) -> None:
        """Warm-up is over: note every kernel from now on."""
        if not self._attached:
            self._attach()
        self.tripped.clear()
        self._armed = True

    def disarm(self) -> None:
        """Compiles are expected again, as when another model starts."""
        self._armed = False

    def _attach(self) -> None:
        knobs = triton.knobs.compilation
        before = knobs.listener

        def listen(**facts: Any) -> None:
            if before is not None:
                before(**facts)
            if self._armed:
                self._note(facts["src"], compiled=not facts["cache_hit"])

        knobs.listener = listen
        self._attached = True

    def _note(self, source: Any, *, compiled: bool) -> None:
        constants = {".".join(map(str, k)): v for k, v in source.constants.items()}
        late = LateKernel(
            kernel=source.name,
            facts=f"{source.signature} {constants}",
            compiled=compiled,
        )
        self.tripped.append(late)
        _log.warning(
            "kernel %s was %s while serving, and requests waited for it: %s",
            late.kernel, "compiled" if compiled else "loaded", late.facts,
        )  # fmt: skip


tripwire = Tripwire()
"""The process's wire: Triton has one place to listen."""
