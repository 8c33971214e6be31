# SPDX-License-Identifier: Apache-2.0
"""Cases from a file of ``bedplate trace-ops``: shapes of a real run, numbers drawn anew."""

from __future__ import annotations

__all__ = ["recorded_cases"]

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from bedplate.conformance.cases.operations import OpCase, cases_of
from bedplate.reference.ops import PartialProduct
from bedplate.reference.rope import HeadNorm, RopeTable
from bedplate.runner.op_trace import read_trace

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from bedplate.conformance.cases.operations import Draw

_RECORDS = {kind.__name__: kind for kind in (HeadNorm, PartialProduct, RopeTable)}
_DISTINCT = ("slots",)
"""Arguments whose integers must differ: two rows at one place have no order."""
_SPARE_SLOTS = 64
_WEIGHTS = ("weight", "norm_weight", "q_weight", "k_weight")


def recorded_cases(path: Path) -> list[OpCase]:
    """One case per distinct call, named by its place in the file.

    Calls whose integers mean more than their range (sampling, steps) are never recorded.
    """
    return [
        _case(number, entry)
        for number, entry in enumerate(read_trace(path), start=1)
        if cases_of(entry["op"])
    ]


def _case(number: int, entry: dict[str, Any]) -> OpCase:
    """As close as the widest of the operation's own cases in that dtype."""
    usual = cases_of(entry["op"])
    known = [case for case in usual if case.dtype == entry["dtype"]] or usual
    template = max(known, key=lambda case: case.tolerance)
    arguments = entry["arguments"]
    return replace(
        template,
        name=f"recorded.{number}",
        dtype=entry["dtype"],
        make=partial(_make, arguments=arguments),
        attributes=entry["attributes"],
        spaced=tuple(name for name, value in arguments.items() if _is_spaced(value)),
        shifted=False,
        rows=(),
        nbytes=0,
    )


def _small_pools(draw: Draw, arguments: dict[str, Any]) -> dict[str, Any]:
    """A cache of no more pages than the case needs: the real one may be most of the memory."""
    slots = arguments.get("slots")
    if slots is None:
        return arguments
    needed = min(arguments["keys"]["shape"][0], slots["shape"][0] + _SPARE_SLOTS)
    rows = draw.whole_pages(needed)
    pools = {
        name: {**arguments[name], "shape": [rows, *arguments[name]["shape"][1:]]}
        for name in ("keys", "values")
    }
    return {**arguments, **pools, "slots": {**slots, "range": [1, rows - 1]}}


def _make(draw: Draw, _dtype: torch.dtype, *, arguments: dict[str, Any]) -> dict[str, Any]:
    small = _small_pools(draw, arguments)
    return {name: _value(draw, name, value) for name, value in small.items()}


def _value(draw: Draw, name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "dtype" in value:
        return getattr(torch, value["dtype"])
    if "record" in value:
        parts = {n: _value(draw, n, v) for n, v in value["fields"].items()}
        return _RECORDS[value["record"]](**parts)
    return _tensor(draw, name, value)


def _tensor(draw: Draw, name: str, value: dict[str, Any]) -> Tensor:
    shape, dtype = value["shape"], getattr(torch, value["tensor"])
    if "range" in value:
        low, high = value["range"]
        count = int(torch.Size(shape).numel())
        if name in _DISTINCT and high - low + 1 >= count:
            distinct: Tensor = low + draw.order(high - low + 1)[:count]
            return distinct.view(shape).to(dtype)
        return draw.integers(low, high + 1, *shape).to(dtype)
    if name in _WEIGHTS and len(shape) == 1:
        return 1 + draw.normal(*shape, dtype=dtype, scale=0.3)
    scale = shape[-1] ** -0.5 if name == "weight" else 1.0
    return draw.normal(*shape, dtype=dtype, scale=scale)


def _is_spaced(value: Any) -> bool:
    """Whether rows of a recorded tensor lay apart."""
    if not isinstance(value, dict) or len(value.get("shape", ())) < 2:
        return False
    return bool(value["strides"][-2] > value["shape"][-1])
