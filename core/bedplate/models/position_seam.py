# SPDX-License-Identifier: Apache-2.0
"""Positions for decoders that count their tokens themselves.

BART-like decoders take no positions: they count from one past length for the whole batch and
hand the count to their position embedding as keyword ``position_ids``.  Replacing that keyword
lets requests of different lengths share a batch.  The probe finds the modules, the adapter
keeps the seam up to date.
"""

from __future__ import annotations

__all__ = ["PositionSeam", "counting_modules"]

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

_KEYWORD = "position_ids"


def counting_modules(
    seen: Mapping[tuple[str, str, int], tuple[int, ...]],
) -> tuple[str, ...]:
    """Modules that received 0, 1, 2 … as ``position_ids`` while the model counted.

    Args:
        seen: Integers by (module, argument, number of the call); ``Observation.positions``.
    """
    return tuple(
        module
        for (module, argument, _), values in seen.items()
        if argument == _KEYWORD and values == tuple(range(len(values)))
    )


class PositionSeam:
    """Replaces the count that some modules receive by ``positions``.

    Args:
        model: The model that holds the modules; they get a hook for good.
        modules: Their paths.

    Attributes:
        positions: ``[T]`` int64; set before each forward.
    """

    def __init__(self, model: nn.Module, modules: Iterable[str]) -> None:
        self.positions: Tensor | None = None
        self._handles = [
            model.get_submodule(path).register_forward_pre_hook(self._replace, with_kwargs=True)
            for path in modules
        ]

    def remove(self) -> None:
        """Let the modules receive the model's own count again."""
        for handle in self._handles:
            handle.remove()

    def _replace(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        counted = kwargs.get(_KEYWORD)
        if counted is None or self.positions is None:
            return args, kwargs
        return args, kwargs | {_KEYWORD: self.positions.view(counted.shape)}
