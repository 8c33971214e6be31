# SPDX-License-Identifier: Apache-2.0
"""Named operations and their providers.

An operation is a name with one plain-torch meaning in ``bedplate.reference.ops``.  Plugins
register faster implementations; the reference is always the last candidate, so a backend
without a single kernel is complete.
"""

from __future__ import annotations

__all__ = ["OpProvider", "OpRegistry", "OpRequest"]

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from bedplate.contract.decisions import Support

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bedplate.contract.capabilities import DeterminismClass


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRequest:
    """One use of one operation, asked for before any call.

    Attributes:
        op: Name of the operation, a key of ``bedplate.reference.ops.OPERATIONS``.
        dtype: Name of the activations' torch dtype.
        attributes: Static properties of the use (sizes, rounding order, activation, …).
        arch: The device's architecture word.
    """

    op: str
    dtype: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    arch: str = ""


def _always(_request: OpRequest) -> Support:
    return Support.yes()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpProvider:
    """One implementation of one operation.

    Attributes:
        op: Name of the operation.
        provider: Plugin that brings it; ``reference`` for the plain-torch meaning.
        call: The implementation; same arguments and results as the reference.
        priority: Higher is preferred. Backends use 100, override packs 200.
        supports: Whether a request can be served correctly; must be honest both ways.
        determinism: Strongest promise of this implementation.
        kind: ``backend``, ``kernels`` or ``reference``.
    """

    op: str
    provider: str
    call: Callable[..., Any]
    priority: int = 100
    supports: Callable[[OpRequest], Support] = _always
    determinism: DeterminismClass = "run_to_run"
    kind: Literal["backend", "kernels", "reference"] = "backend"


class OpRegistry(ABC):
    """Where plugins register implementations during binding."""

    @abstractmethod
    def register(self, provider: OpProvider) -> None:
        """Add one implementation.

        An unknown operation, or a second implementation by the same provider, is refused
        with the known names.
        """

    @abstractmethod
    def choose(self, request: OpRequest) -> OpProvider:
        """The best provider that supports ``request``; records the decision."""
