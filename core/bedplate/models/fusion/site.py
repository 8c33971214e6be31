# SPDX-License-Identifier: Apache-2.0
"""One place in one model where a faster form may stand in, and the proof that it may.

A site shadows ``forward`` on module instances and nothing else: no class is changed, nothing
is global, and ``revert`` leaves the model as it was found.
"""

from __future__ import annotations

__all__ = ["Evidence", "Providers", "Shadow", "Site", "difference", "tolerance"]

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from bedplate.contract import OpProvider
from bedplate.errors import ContractError

if TYPE_CHECKING:
    from bedplate.contract import OpRequest, Support

Providers: TypeAlias = Mapping[str, OpProvider]
"""Operation → who does it."""

# Relative to the largest value. Two units in the last place for the narrow types, as sums of
# many products may be taken in another order.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What verification saw.

    Attributes:
        ok: Whether the fused form may be used.
        text: The numbers, as a reason for people.
    """

    ok: bool
    text: str


class Site(ABC):
    """A found place.

    Attributes:
        pattern: Name of the pattern, the last word of the choice point.
        path: Where, as a module path.
        kind: Sites of one kind are accepted or reverted together by the whole-model check.
    """

    pattern: str
    path: str
    kind: str

    @abstractmethod
    def requests(self) -> tuple[OpRequest, ...]:
        """The operations that the fused form needs, each once."""

    @abstractmethod
    def pays(self, providers: Providers) -> Support:
        """Whether the form is worth having with these providers; the reason either way."""

    @abstractmethod
    def verify(self, providers: Providers) -> Evidence:
        """Make the fused form and compare it with the module; changes nothing in the model."""

    @abstractmethod
    def apply(self) -> None:
        """Take the form that was made last into use; the caller knows whether it was proven."""

    @abstractmethod
    def revert(self) -> None:
        """Give the modules their own ``forward`` back."""


class Shadow(partial[Any]):
    """A ``forward`` of one module instance, without a Python frame of its own.

    Copying a module would copy the shadow, which reads the weights of the original; so
    copying is refused while it is there.
    """

    __slots__ = ()

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        raise ContractError(
            "A fused model cannot be copied or pickled: its parts refer to each other's "
            "storage. Call revert() of its fusion plan first, or save the weights."
        )

    def put(self, module: nn.Module) -> None:
        """Shadow the module's ``forward`` by a plain attribute, which is found first."""
        vars(module)["forward"] = self

    @staticmethod
    def remove(module: nn.Module) -> None:
        """Uncover the class's own ``forward``."""
        vars(module).pop("forward", None)


def tolerance(dtype: torch.dtype) -> float:
    """Largest acceptable ``difference`` for sums of products in that dtype."""
    return TOLERANCES.get(dtype, 0.0)


def difference(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest absolute value wanted.

    Infinite if one has another shape or dtype, or is not a number where the other is.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    gap = (got.double() - want.double()).abs()
    gap = torch.where((got == want) | (got.isnan() & want.isnan()), 0.0, gap)
    scale = want.double().nan_to_num(0.0, 0.0, 0.0).abs().amax().clamp_min(1e-30)
    return float((gap.amax() / scale).nan_to_num(float("inf")))
