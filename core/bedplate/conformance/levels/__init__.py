# SPDX-License-Identifier: Apache-2.0
"""The nine levels, each a module with a function ``checks(subject)``.

They are ordered by what they need: each uses only what the levels before it have shown.
"""

from __future__ import annotations

__all__ = ["LEVELS", "Level"]

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One level.

    Attributes:
        number: 0 to 8.
        title: A word or two.
        asks: What it asks, in a sentence.
    """

    number: int
    title: str
    asks: str

    @property
    def module(self) -> str:
        """Dotted name of the module with its checks."""
        return f"{__name__}.{self.title.replace(' ', '_')}"


LEVELS = (
    Level(number=0, title="hygiene", asks="Is it light, honest about itself, and does it leave "
          "the core as it was?"),
    Level(number=1, title="runtime", asks="Do events, memory figures, seeds, activation and "
          "shutdown mean what the contract says?"),
    Level(number=2, title="operations", asks="Is every operation what the reference says, at "
          "any size, layout and dtype, and is supports() honest both ways?"),
    Level(number=3, title="attention", asks="Is attention right in every mode over any pages, "
          "and blind to what no token owns?"),
    Level(number=4, title="slots", asks="Are slots handed out once, taken back once and never "
          "lost, and do pools keep what they are given?"),
    Level(number=5, title="graphs", asks="Does a replay equal the eager pass, whatever ran "
          "before, and does a failing capture fall back with a record?"),
    Level(number=6, title="generation", asks="Do whole models give transformers' tokens "
          "wherever those are decided, in any batch, order and chunking?"),
    Level(number=7, title="speed", asks="Do ratios and counts stay in their budget: no hook in "
          "a step, few waits, cheap replays?"),
    Level(number=8, title="faults", asks="Does every fault end in its own code and give "
          "everything back?"),
)  # fmt: skip
