# SPDX-License-Identifier: Apache-2.0
"""Count decisions and steps; write each as a JSON line to ``BEDPLATE_OBSERVER_FILE``.

Separate from the core because an engine is complete without it: it uses hooks only.
"""

from __future__ import annotations

__all__ = ["Observer", "plugin"]

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from bedplate.contract import BackendManifest, Decision, ReportItem, StepStats, hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

FILE_VARIABLE = "BEDPLATE_OBSERVER_FILE"


class Observer:
    """Counts, and a file if one is named when the first event arrives."""

    def __init__(self) -> None:
        self.decisions = 0
        self.steps = 0
        self.tokens = 0
        self._file: TextIO | None = None

    @hookimpl
    def bedplate_manifest(self) -> BackendManifest:
        """Identity."""
        summary = "counts decisions and steps, writes JSON lines"
        return BackendManifest(name="observer", kind="plugin", summary=summary)

    @hookimpl
    def bedplate_environment_report(self) -> Sequence[ReportItem]:
        """Where lines would go."""
        return [ReportItem(name="writes to", value=os.environ.get(FILE_VARIABLE) or "nowhere")]

    @hookimpl
    def bedplate_decision(self, decision: Decision) -> None:
        """One line per decision."""
        self.decisions += 1
        self._write({"event": "decision", "point": decision.point, "chosen": decision.chosen})

    @hookimpl
    def bedplate_step_finished(self, stats: StepStats) -> None:
        """One line per step."""
        self.steps += 1
        self.tokens += stats.num_tokens
        self._write({"event": "step", **asdict(stats)})

    @hookimpl
    def bedplate_shutdown(self) -> None:
        """The totals; the next engine of the process starts from zero."""
        totals = {"decisions": self.decisions, "steps": self.steps, "tokens": self.tokens}
        self._write({"event": "total", **totals})
        if self._file is not None:
            self._file.close()
        self._file = None
        self.decisions = self.steps = self.tokens = 0

    def _write(self, line: dict[str, Any]) -> None:
        path = os.environ.get(FILE_VARIABLE)
        if not path:
            return
        if self._file is None:
            self._file = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._file.write(json.dumps(line) + "\n")


plugin = Observer()
