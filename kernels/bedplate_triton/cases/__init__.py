# SPDX-License-Identifier: Apache-2.0
"""One list of cases for each operation, used four times.

The interpreter runs the small ones in every test run, an offline compiler builds all of them
for every architecture, a device checks all of them against plain torch, and the benchmark
times the large ones against the device's ceilings.

Each module here has ``CASES``; ``all_cases`` finds them.
"""

from __future__ import annotations

__all__ = ["NARROW", "Case", "Inputs", "all_cases", "case_modules", "relative_error"]

from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from bedplate.reference.closeness import relative_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from bedplate_triton.features import Features

Inputs: TypeAlias = dict[str, Any]
"""Arguments of a case, by name."""

NARROW = (
    ("", torch.float8_e5m2, ""),
    *(
        (f", {name}", getattr(torch, name), name)
        for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz")
    ),
)
"""Caches of eight bits: what is special, dtype, and what the device must convert for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One use of one kernel.

    Attributes:
        op: Name of the operation.
        name: What is special about the case; unique for the operation.
        make: Draws inputs on a device from a seed; on ``meta`` only shapes matter.
        run: Launches the kernel and returns what it wrote. Reads ``inputs`` only, but for
            what the operation changes in place.
        reference: The same by plain torch, computed in float32 or wider.
        tolerance: Largest ``relative_error``; 0 means equal bits.
        small: Whether the interpreter can run it in well under a second.
        nbytes: Bytes of device memory that must move at least, for large cases.
        flops: Arithmetic operations, for large cases.
        target: Share of the ceiling that is aimed at, for large cases that are measured.
        launch: What is timed, where ``run`` does more than launch the kernel.
        converts: Name of a torch dtype that the device must convert, for it to be asked.
    """

    op: str
    name: str
    make: Callable[[torch.device, int], Inputs]
    run: Callable[[Inputs, Features], tuple[Tensor, ...]]
    reference: Callable[[Inputs], tuple[Tensor, ...]]
    tolerance: float
    small: bool = True
    nbytes: int = 0
    flops: int = 0
    target: float = 0.0
    launch: Callable[[Inputs, Features], object] | None = None
    converts: str = ""

    def runs_on(self, features: Features) -> bool:
        """Whether a device has what the case is about."""
        return not self.converts or self.converts in features.narrow

    @property
    def timed(self) -> Callable[[Inputs, Features], object]:
        """The launches alone."""
        return self.launch or self.run

    @property
    def label(self) -> str:
        """Name that is unique among all operations."""
        return f"{self.op}: {self.name}"


def case_modules() -> tuple[str, ...]:
    """Names of the modules that hold cases."""
    return tuple(sorted(each.name for each in iter_modules(__path__)))


def all_cases(small: bool | None = None) -> tuple[Case, ...]:
    """Every case, or only the small or large ones."""
    modules = [import_module(f"{__name__}.{name}") for name in case_modules()]
    cases = tuple(case for module in modules for case in module.CASES)
    return tuple(case for case in cases if small is None or case.small is small)
