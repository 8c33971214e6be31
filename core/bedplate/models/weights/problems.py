# SPDX-License-Identifier: Apache-2.0
"""All that is wrong with a set of tensors, in one error.

Lists every tensor, but folds runs of layers (``model.layers.{0-31}.mlp.up_proj.weight``), so
that a wrong config on a large model is still one screen.
"""

from __future__ import annotations

__all__ = ["Problems", "fold_names"]

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bedplate.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from bedplate.models.checkpoint_names import NamedPart
    from bedplate.models.weights.sources import TensorInfo


@dataclass(slots=True)
class Problems:
    """Collected while a plan is made.

    Attributes:
        missing: Slots that nothing fills.
        unexpected: Tensors that lead nowhere.
        misshapen: (slot, shape wanted, shape found, files).
        mistyped: (slot, dtype wanted, dtype found, files).
        conflicts: Pairs of unlike tensors that lead to the same slot.
        unconvertible: (slot, why, files).
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[TensorInfo] = field(default_factory=list)
    misshapen: list[tuple[str, tuple[int, ...], tuple[int, ...], str]] = field(
        default_factory=list
    )
    mistyped: list[tuple[str, torch.dtype, torch.dtype, str]] = field(default_factory=list)
    conflicts: list[tuple[NamedPart, NamedPart]] = field(default_factory=list)
    unconvertible: list[tuple[str, str, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(
            (
                self.missing,
                self.unexpected,
                self.misshapen,
                self.mistyped,
                self.conflicts,
                self.unconvertible,
            )
        )

    def add_misshapen(
        self, slot: TensorInfo, found: tuple[int, ...], infos: Sequence[TensorInfo]
    ) -> None:
        """Record that ``slot`` would get another shape."""
        self.misshapen.append((slot.name, slot.shape, found, _files(infos)))

    def add_mistyped(
        self, slot: TensorInfo, found: torch.dtype, infos: Sequence[TensorInfo]
    ) -> None:
        """Record that ``slot`` would get a dtype that no plain cast leads to."""
        self.mistyped.append((slot.name, slot.dtype, found, _files(infos)))

    def add_unconvertible(
        self, target: str, infos: Sequence[TensorInfo], error: Exception
    ) -> None:
        """Record that the tensors that make up ``target`` do not fit together."""
        self.unconvertible.append((target, f"{type(error).__name__}: {error}", _files(infos)))

    def error(self, what: str, remedy: str) -> WeightsError:
        """The error that lists everything.

        Args:
            what: First sentence, such as ``The checkpoint does not fit Qwen3ForCausalLM``.
            remedy: Last sentence: what to do.
        """
        sections = [text for text in self._sections() if text]
        return WeightsError(
            f"{what}.\n" + "\n".join(sections) + f"\nNothing was changed. {remedy}",
            missing=tuple(self.missing),
            unexpected=tuple(info.name for info in self.unexpected),
            misshapen=tuple(self.misshapen),
            mistyped=tuple(self.mistyped),
            conflicts=tuple((a.name, b.name) for a, b in self.conflicts),
            unconvertible=tuple(self.unconvertible),
        )

    def _sections(self) -> Iterable[str]:
        yield _section("Missing", len(self.missing), fold_names(self.missing))
        by_file: dict[str, list[str]] = {}
        for info in self.unexpected:
            by_file.setdefault(info.origin, []).append(info.name)
        yield _section(
            "Unexpected",
            len(self.unexpected),
            [
                f"{line} ({file})"
                for file, names in by_file.items()
                for line in fold_names(names)
            ],
        )
        for title, rows in (("Misshapen", self.misshapen), ("Wrong dtype", self.mistyped)):
            lines = [f"{name}: wants {want}, got {got} ({at})" for name, want, got, at in rows]
            yield _section(title, len(lines), lines)
        yield _section(
            "Not equal, though one tensor of the model",
            len(self.conflicts),
            [f"{first.name} and {second.name}" for first, second in self.conflicts],
        )
        lines = [f"{name}: {why} ({at})" for name, why, at in self.unconvertible]
        yield _section("Parts that do not fit together", len(lines), lines)


def fold_names(names: Sequence[str]) -> list[str]:
    """Fold names that differ only in their first number, in order of first appearance.

    ``a.0.w``, ``a.1.w``, ``a.3.w`` become ``a.{0-1,3}.w``.
    """
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        before, number, after = _split(name)
        numbers.setdefault((before, after), []).append(number)
    return [f"{before}{_ranges(values)}{after}" for (before, after), values in numbers.items()]


def _split(name: str) -> tuple[str, int, str]:
    match = re.search(r"(?<=\.)\d+(?=\.)", name)
    if match is None:
        return name, -1, ""
    return name[: match.start()], int(match.group()), name[match.end() :]


def _ranges(values: list[int]) -> str:
    if values == [-1]:
        return ""
    runs: list[list[int]] = []
    for value in sorted(set(values)):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text if text.isdigit() else f"{{{text}}}"


def _section(title: str, count: int, lines: Sequence[str]) -> str:
    return "\n".join([f"{title} ({count}):", *(f"  {line}" for line in lines)]) if lines else ""


def _files(infos: Sequence[TensorInfo]) -> str:
    return ", ".join(sorted({info.origin for info in infos}))
