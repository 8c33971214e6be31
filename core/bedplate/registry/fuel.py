# SPDX-License-Identifier: Apache-2.0
"""Fuel: how many kernels may still replace plain torch; what ``bisect-kernels`` turns.

Kernels are counted in the order in which a start-up takes them into use, which is the same
every time, so the first n of them are the first n of every longer run.
"""

from __future__ import annotations

__all__ = ["Fuel"]

from pathlib import Path
from typing import TYPE_CHECKING

from bedplate.contract.decisions import Support

if TYPE_CHECKING:
    from collections.abc import Mapping

from bedplate import env


class Fuel:
    """Counts the kernels of one engine.

    Args:
        limit: Most kernels that may be used; ``None`` = all.
        file: Gets one line for each kernel that is asked about, allowed or not.
    """

    def __init__(self, limit: int | None = None, file: str | None = None) -> None:
        self._limit = limit
        self._file = None if file is None else Path(file)
        self._places: dict[str, int] = {}

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Fuel:
        """As ``BEDPLATE_FUEL`` and ``BEDPLATE_FUEL_FILE`` say."""
        return cls(env.FUEL.get(environ), env.FUEL_FILE.get(environ))

    def take(self, kernel: str) -> Support:
        """Whether ``kernel`` may be used; asking again gives the same answer."""
        if kernel not in self._places:
            self._places[kernel] = len(self._places) + 1
            if self._file is not None:
                with self._file.open("a", encoding="utf-8") as lines:
                    lines.write(kernel + "\n")
        place = self._places[kernel]
        if self._limit is None or place <= self._limit:
            return Support.yes()
        return Support.no(f"it is kernel {place}, and {env.FUEL.name} is {self._limit}")
