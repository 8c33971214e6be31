# SPDX-License-Identifier: Apache-2.0
"""Positions for models that count their tokens themselves.

BART-like decoders take no positions: they count from one past length for the whole batch and
hand the count to their position embedding as keyword ``position_ids``.  Replacing that keyword
lets requests of different lengths share a batch.

Llama-4 takes positions, and yet scales queries by a count of its own, on top of the past
length that its cache reports.  A stand-in for the cache reports the difference, per token.

The probe finds out which seam a model needs, the adapter keeps it up to date.

Shapes: T new tokens.
"""

from __future__ import annotations

__all__ = ["PastLength", "PositionSeam", "counting_modules"]

from typing import TYPE_CHECKING, Any

import torch

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


class PastLength:
    """Stands in for a cache that stores nothing: it only reports past lengths.

    Not a subclass of transformers' cache, so that no mask is sized by it.

    Args:
        positions: ``[T]`` int64.
        counted: ``[T]`` what the model counts: 0, 1, 2 …, unless the probe disturbs it.
    """

    def __init__(self, positions: Tensor, counted: Tensor | None = None) -> None:
        if counted is None:
            counted = torch.arange(positions.shape[0], device=positions.device)
        self._past = positions - counted

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:
        """``[T]`` past length of each token: its position less the model's count."""
        return self._past

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values back: the attention backend stores them."""
        return key_states, value_states
