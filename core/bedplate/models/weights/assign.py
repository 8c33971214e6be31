# SPDX-License-Identifier: Apache-2.0
"""Which source tensors fill which slots of a module, decided before anything is copied.

Conversions run on the meta device first, so names, shapes and dtypes of the whole set are
known and every problem is reported at once.  ``WeightIndex`` carries the plan out.
"""

from __future__ import annotations

__all__ = ["Assignment", "AssignmentPlan", "plan_assignments"]

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bedplate.models.checkpoint_names import CheckpointNames, NamedPart, load_rules
from bedplate.models.weights.problems import Problems

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from bedplate.models.weights.sources import TensorInfo, WeightSource

CASTABLE = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
"""Dtypes between which a plain cast keeps the meaning; others must be equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One step of a plan: read these, get those.

    Attributes:
        parts: The checkpoint tensors, in the order in which the conversion wants them.
        targets: Slots that they fill.
        nbytes: Bytes read.
    """

    parts: tuple[NamedPart, ...]
    targets: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignmentPlan:
    """A whole set of tensors and where they go.

    Attributes:
        steps: In the order of the source's files.
        problems: Everything that is wrong; check it before the first step.
        names: Converts the steps that need it; ``None`` if the names are exact.
        aliases: Tied name → slot.
    """

    steps: tuple[Assignment, ...]
    problems: Problems
    names: CheckpointNames | None
    aliases: Mapping[str, str] = field(default_factory=dict)

    def stream(self, source: WeightSource) -> Iterator[tuple[Assignment, dict[str, Tensor]]]:
        """Read and convert one step after the other; only one step's tensors live."""
        for step in self.steps:
            yield step, self._made(step, [source.read(part.name) for part in step.parts])

    def _made(self, step: Assignment, tensors: list[Tensor]) -> dict[str, Tensor]:
        if self.names is None or step.parts[0].pattern is None:
            return {step.targets[0]: tensors[0]}
        made = self.names.convert(step.parts, tensors)
        return {self.aliases.get(name, name): tensor for name, tensor in made.items()}


def plan_assignments(
    module: nn.Module,
    slots: Mapping[str, TensorInfo],
    aliases: Mapping[str, str],
    source: WeightSource,
    *,
    complete: bool,
    exact: bool = False,
) -> AssignmentPlan:
    """Lead every tensor of ``source`` to its slot, without reading any but tied ones.

    Args:
        module: The model whose names these are.
        slots: Canonical module name → shape and dtype.
        aliases: Other names of tied tensors → canonical name.
        source: What is to be loaded.
        complete: Whether every slot must be filled.
        exact: Take the names as module names, without any conversion.
    """
    problems = Problems()
    names = None if exact else CheckpointNames(module, {**slots, **aliases})
    rules = load_rules(module)
    filled: dict[str, Assignment] = {}
    for group in _groups(_parts(names, source)):
        infos = [source.infos[part.name] for part in group]
        made = _on_meta(names, group, infos, problems)
        if any(name not in slots and name not in aliases for name in made):
            if not _matches(rules.ignore_unexpected, [*made, *(part.name for part in group)]):
                problems.unexpected.extend(infos)
            continue
        step = Assignment(
            parts=tuple(group),
            targets=tuple(aliases.get(name, name) for name in made),
            nbytes=sum(info.nbytes for info in infos),
        )
        if not _repeats(step, filled, source, problems):
            filled.update(dict.fromkeys(step.targets, step))
            for target, tensor in zip(step.targets, made.values(), strict=True):
                _compare(slots[target], tensor, infos, problems)
    if complete:
        lacking = [name for name in slots if name not in filled]
        problems.missing.extend(n for n in lacking if not _matches(rules.ignore_missing, [n]))
    order = {name: place for place, name in enumerate(source.infos)}
    distinct = {id(step): step for step in filled.values()}.values()
    steps = tuple(sorted(distinct, key=lambda step: order[step.parts[0].name]))
    return AssignmentPlan(steps=steps, problems=problems, names=names, aliases=aliases)


def _parts(names: CheckpointNames | None, source: WeightSource) -> Sequence[NamedPart]:
    if names is None:
        return [NamedPart(name, name, None) for name in source.infos]
    return names.resolve(tuple(source.infos))


def _groups(parts: Sequence[NamedPart]) -> Iterator[list[NamedPart]]:
    """Parts that one conversion takes together; a renamed one stands alone."""
    together: dict[tuple[str, str], list[NamedPart]] = {}
    for part in parts:
        key = (part.target, "" if part.pattern is not None else part.name)
        together.setdefault(key, []).append(part)
    yield from together.values()


def _on_meta(
    names: CheckpointNames | None,
    group: Sequence[NamedPart],
    infos: Sequence[TensorInfo],
    problems: Problems,
) -> dict[str, Tensor]:
    tensors = [torch.empty(info.shape, dtype=info.dtype, device="meta") for info in infos]
    if names is None or group[0].pattern is None:
        return {group[0].target: tensors[0]}
    try:
        return names.convert(group, tensors)
    except Exception as error:
        problems.add_unconvertible(group[0].target, infos, error)
        return {}


def _compare(
    slot: TensorInfo, tensor: Tensor, infos: Sequence[TensorInfo], problems: Problems
) -> None:
    if tuple(tensor.shape) != slot.shape:
        problems.add_misshapen(slot, tuple(tensor.shape), infos)
    elif tensor.dtype != slot.dtype and not {tensor.dtype, slot.dtype} <= CASTABLE:
        problems.add_mistyped(slot, tensor.dtype, infos)


def _repeats(
    step: Assignment, filled: Mapping[str, Assignment], source: WeightSource, problems: Problems
) -> bool:
    """Whether the step's slot has been filled already, as tied tensors saved twice are."""
    earlier = next((filled[target] for target in step.targets if target in filled), None)
    if earlier is None:
        return False
    first, second = earlier.parts[0], step.parts[0]
    plain = first.pattern is None and second.pattern is None
    if not (plain and _equal(source.read(first.name), source.read(second.name))):
        problems.conflicts.append((first, second))
    return True


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(
        first, second.to(first.device, first.dtype)
    )


def _matches(patterns: Sequence[str], names: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns for name in names)
