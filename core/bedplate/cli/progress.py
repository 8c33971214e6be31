# SPDX-License-Identifier: Apache-2.0
"""Progress bars on a terminal, nothing when piped."""

from __future__ import annotations

__all__ = ["Progress", "show_progress"]

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


class Progress:
    """Bars by name; made when first told about, closed together."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def stage(self, what: str, done: int, total: int) -> None:
        """A start-up stage: ``done`` of ``total`` bytes or graphs."""
        self._update(what, done, total)

    def requests(self, done: int, total: int) -> None:
        """Finished requests of a batch."""
        self._update("requests", done, total)

    def close(self) -> None:
        """Leave the terminal clean."""
        for bar in self._bars.values():
            bar.close()

    def _update(self, what: str, done: int, total: int) -> None:
        if what not in self._bars:
            from tqdm import tqdm

            self._bars[what] = tqdm(
                total=total, desc=what, leave=False, file=sys.stderr, unit_scale=True
            )
        bar = self._bars[what]
        bar.update(done - bar.n)


class _Silent(Progress):
    def _update(self, what: str, done: int, total: int) -> None:
        """Nobody is watching."""


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Bars for the duration of a block."""
    progress = Progress() if sys.stderr.isatty() else _Silent()
    try:
        yield progress
    finally:
        progress.close()
