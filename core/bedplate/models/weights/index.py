# SPDX-License-Identifier: Apache-2.0
"""The one table of a model's weights: name → storage.

Everything that changes weights goes through it, so that storage never moves (captured graphs
stay right), a refused set changes nothing, and whatever was derived from weights is made anew.
Views of merged storage are what the entries usually are, but only an optimisation: an entry
may have a ``Transform`` between the logical tensor and what is stored.
"""

from __future__ import annotations

__all__ = ["Transform", "WeightIndex"]

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bedplate.errors import WeightsError
from bedplate.models.weights.assign import AssignmentPlan, plan_assignments
from bedplate.models.weights.sources import TensorInfo, TensorSource, WeightSource

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, on the loading thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """How one tensor is stored when not plainly.

    Attributes:
        store: Write a logical tensor (second) into the storage (first), in place.
        fetch: The logical tensor of a storage, a copy.
    """

    store: Callable[[Tensor, Tensor], None]
    fetch: Callable[[Tensor], Tensor]


class WeightIndex:
    """Names of a module's parameters and persistent buffers, and where they live.

    Tied tensors are one entry; their other names are accepted everywhere.

    Args:
        module: The model. Its tensors may later be moved into merged storage, but not be
            replaced by other objects.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._views: dict[str, Tensor] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._transforms: dict[str, Transform] = {}
        self._refreshers: list[Callable[[], None]] = []
        self.aliases: dict[str, str] = {}
        first_names: dict[int, str] = {}
        for name, value in module.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor):
                continue  # a module's extra state
            first = first_names.setdefault(id(value), name)
            if first != name:
                self.aliases[name] = first
                continue
            self._views[name] = value
            self._infos[name] = TensorInfo(
                name=name, shape=tuple(value.shape), dtype=value.dtype, origin="module"
            )

    @property
    def module(self) -> nn.Module:
        """The model behind the names."""
        return self._module

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Canonical name → logical shape and dtype."""
        return self._infos

    def names(self) -> tuple[str, ...]:
        """Every name once, tied ones by their first, in the module's order."""
        return tuple(self._views)

    def canonical(self, name: str) -> str:
        """The entry that ``name`` means.

        Raises:
            WeightsError: No such name; offers the nearest.
        """
        name = self.aliases.get(name, name)
        if name in self._views:
            return name
        near = difflib.get_close_matches(name, [*self._views, *self.aliases], n=3)
        hint = f"; the nearest names are {', '.join(near)}" if near else ""
        raise WeightsError(f"The model has no tensor {name!r}{hint}.", unexpected=(name,))

    def get(self, name: str) -> Tensor:
        """The logical tensor: the storage itself, or a copy if it is stored transformed."""
        name = self.canonical(name)
        view = self._views[name].detach()
        return self._transforms[name].fetch(view) if name in self._transforms else view

    def add_refresher(self, refresh: Callable[[], None]) -> None:
        """Call ``refresh`` after every update, to make derived tensors anew, in place."""
        self._refreshers.append(refresh)

    def set_transform(self, name: str, transform: Transform) -> None:
        """Store ``name`` otherwise from now on; what is stored must be so already."""
        self._transforms[self.canonical(name)] = transform

    def update(
        self,
        named_tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
        *,
        exact: bool = False,
    ) -> tuple[str, ...]:
        """Copy tensors in place, all or none; see ``update_from``.

        Args:
            named_tensors: By module name or by checkpoint name; any part of the model.
            exact: Module names only, no conversion.
        """
        source = TensorSource(named_tensors)
        # The caller may hand back views of this very model, for instance to swap two of them.
        own = {view.untyped_storage().data_ptr() for view in self._views.values()}
        source.detach_from(own)
        return self.update_from(source, exact=exact)

    def update_from(
        self, source: WeightSource, *, exact: bool = False, complete: bool = False
    ) -> tuple[str, ...]:
        """Copy everything that ``source`` has into place, all or none.

        Names, shapes and dtypes of the whole set are checked first. Should copying or a
        refresher still fail, the old values come back from copies kept on the host, which
        may take as much host memory as the updated tensors.

        Args:
            source: Names as in the checkpoint, or the module's own.
            exact: Module names only, no conversion.
            complete: Every tensor of the model must be there.

        Returns:
            Names of the entries that were written.

        Raises:
            WeightsError: The set does not fit; lists all problems; nothing was changed.
        """
        plan = self.plan(source, exact=exact, complete=complete)
        if plan.problems:
            raise plan.problems.error(
                f"The tensors do not fit {type(self._module).__name__}",
                "Send tensors of the model that was loaded, each in its full shape.",
            )
        undo: dict[str, Tensor] = {}
        try:
            self.write(plan, source, before=lambda name: undo.update({name: self._saved(name)}))
            self.refresh()
        except BaseException as error:
            self._restore(undo, error)
            raise
        return tuple(undo)

    def plan(
        self, source: WeightSource, *, exact: bool = False, complete: bool = False
    ) -> AssignmentPlan:
        """Where the tensors of ``source`` would go, and all that is wrong with them."""
        return plan_assignments(
            self._module, self._infos, self.aliases, source, complete=complete, exact=exact
        )

    @torch.no_grad()
    def write(
        self,
        plan: AssignmentPlan,
        source: WeightSource,
        *,
        before: Callable[[str], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Carry out a plan without problems. Does not refresh.

        Args:
            plan: From ``plan`` with the same source.
            source: Read one group of tensors at a time.
            before: Called with each name before it is overwritten.
            progress: Told after each group.
        """
        total = sum(step.nbytes for step in plan.steps)
        done = 0
        for step, tensors in plan.stream(source):
            for name in tuple(tensors):
                if before is not None:
                    before(name)
                self._store(name, tensors.pop(name))  # freed before the next group is read
            done += step.nbytes
            if progress is not None:
                progress(done, total)

    def refresh(self) -> None:
        """Make every derived tensor anew."""
        for refresh in self._refreshers:
            refresh()

    def _store(self, name: str, tensor: Tensor) -> None:
        view = self._views[name].detach()
        if name in self._transforms:
            self._transforms[name].store(view, tensor)
        else:
            view.copy_(tensor)

    def _saved(self, name: str) -> Tensor:
        return self._views[name].detach().to("cpu", copy=True)

    @torch.no_grad()
    def _restore(self, undo: Mapping[str, Tensor], error: BaseException) -> None:
        for name, old in undo.items():
            self._views[name].detach().copy_(old)
        try:
            self.refresh()
        except Exception as second:
            error.add_note(f"The old weights are back, but refreshing failed too: {second!r}")
