# SPDX-License-Identifier: Apache-2.0
"""The version of the contract, apart from the package's version.

A minor only adds; a major may remove, after two minors of warnings.  A plugin states the
range that it was written for in its manifest.
"""

from __future__ import annotations

__all__ = ["API_VERSION", "ApiRange"]

from dataclasses import dataclass
from typing import Final

API_VERSION: Final[tuple[int, int]] = (1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiRange:
    """Contract versions that a plugin works with.

    Attributes:
        needs: Lowest (major, minor) that has everything the plugin uses.
        below: First major that the plugin does not claim to work with; the next one
            when not given.
    """

    needs: tuple[int, int] = API_VERSION
    below: int | None = None

    @property
    def first_refused_major(self) -> int:
        """The first major outside the range."""
        return self.needs[0] + 1 if self.below is None else self.below

    def older_side(self, core: tuple[int, int] = API_VERSION) -> str | None:
        """Which side must be upgraded: ``"core"``, ``"plugin"``, or ``None`` if they fit."""
        if core < self.needs:
            return "core"
        return "plugin" if core[0] >= self.first_refused_major else None

    def __str__(self) -> str:
        major, minor = self.needs
        return f"{major}.{minor} up to, not including, {self.first_refused_major}.0"
