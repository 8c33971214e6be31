# SPDX-License-Identifier: Apache-2.0
"""Linears that read the same input become one matrix product.

Found by identity: linears of one parent that were given the very same tensor.  The first
member that is called computes the merged product, the others return their part if they are
given the same object, unchanged; otherwise they compute afresh.  So the order of calls does
not matter and a wrong guess costs time, not correctness.

The weights keep their names: each becomes a view of the merged matrix.

Shapes: N features in, M features out of all members together.
"""

from __future__ import annotations

__all__ = ["SiblingSite", "find_siblings"]

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bedplate.contract import OpRequest, Support
from bedplate.models.fusion.merge import MergedLinear, merge_linears
from bedplate.models.fusion.site import Evidence, Shadow, Site, difference, tolerance

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bedplate.models.fusion.calls import Call
    from bedplate.models.fusion.site import Providers

TRIAL_ROWS = 8


def find_siblings(calls: Sequence[Call]) -> list[SiblingSite]:
    """Groups of two or more plain linears of one parent that always share their input."""
    together: dict[tuple[str, int], list[Call]] = {}
    for call in calls:
        if _is_plain_linear(call):
            together.setdefault((_parent(call.path), id(call.x)), []).append(call)
    company: dict[str, set[tuple[str, ...]]] = {}
    for group in together.values():
        paths = tuple(dict.fromkeys(call.path for call in group))
        for path in paths:
            company.setdefault(path, set()).add(paths)
    members = {call.path: call for call in calls}
    found = dict.fromkeys(
        paths
        for group in together.values()
        if len(paths := tuple(dict.fromkeys(call.path for call in group))) > 1
        and len({call.version for call in group}) == 1
        and all(len(company[path]) == 1 for path in paths)
    )
    taken: set[int] = set()
    sites = []
    for paths in found:
        linears = [members[path].module for path in paths]
        if _mergeable(linears, taken):
            taken.update(id(part.weight) for part in linears)
            sites.append(SiblingSite(_parent(paths[0]), dict(zip(paths, linears, strict=True))))
    return sites


class SiblingSite(Site):
    """One group.

    Args:
        parent: Path of the module that owns the members.
        members: Path → linear, in the order of their calls; the order of the merged rows.

    Attributes:
        members: The linears.
    """

    pattern = "siblings"

    def __init__(self, parent: str, members: dict[str, Any]) -> None:
        leaves = "+".join(path.rpartition(".")[2] for path in members)
        self.path = f"{parent}.{leaves}" if parent else leaves
        self.kind = f"siblings {leaves}"
        self.members: tuple[Any, ...] = tuple(members.values())
        self._product: _Product | None = None

    def requests(self) -> tuple[OpRequest, ...]:
        """``linear`` with the merged sizes."""
        first = self.members[0]
        attributes = {
            "in": first.in_features,
            "out": sum(m.out_features for m in self.members),
        }
        dtype = str(first.weight.dtype).removeprefix("torch.")
        return (OpRequest(op="linear", dtype=dtype, attributes=attributes),)

    def pays(self, providers: Providers) -> Support:
        """Yes, but for float32 by plain torch (``benchmarks.cases.fusion_patterns``)."""
        provider = providers["linear"]
        if provider.kind == "reference" and self.members[0].weight.dtype == torch.float32:
            return Support.no(
                "plain torch gains nothing from one float32 product: measured x1.00 with 1 "
                "token and x1.01 with 32, where bfloat16 has x1.03 and x1.04"
            )
        return Support.yes(
            f"one product instead of {len(self.members)}, by {provider.provider}"
        )

    @torch.no_grad()
    def verify(self, providers: Providers) -> Evidence:
        """Merged product against each member's own, on random rows."""
        first = self.members[0].weight
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(1, TRIAL_ROWS, first.shape[1], generator=generator)
        x = rows.to(first.device, first.dtype)
        product = self._product = _Product(
            providers["linear"].call, merge_linears(self.members)
        )
        worst = max(
            difference(product.take(place, x), member(x))
            for place, member in enumerate(self.members)
        )
        limit = tolerance(first.dtype)
        text = f"largest relative difference {worst:.1e}, limit {limit:.1e}"
        return Evidence(ok=worst <= limit, text=text)

    def apply(self) -> None:
        """Make the weights views of the merged matrix, and shadow the members."""
        product = self._product
        if product is None:
            return
        product.merged.adopt()
        for place, member in enumerate(self.members):
            Shadow(product.take, place).put(member)

    def revert(self) -> None:
        """Uncover the members; their weights stay views, which nothing can tell."""
        for member in self.members:
            Shadow.remove(member)


@dataclass(slots=True)
class _Product:
    """The merged matrix, and the product that members still wait for.

    ``x`` is kept until every member took its part, so its identity cannot be reused.
    """

    call: Callable[..., Tensor]
    merged: MergedLinear
    x: Tensor | None = None
    version: int = 0
    result: Tensor | None = None
    waiting: int = 0  # one bit for each member

    def take(self, place: int, x: Tensor) -> Tensor:
        """``[…, N]`` → the part ``[…, M_i]`` of one member, a view of the merged product.

        Computed now, unless it lies ready for this very ``x``, unchanged since.
        """
        # Tensors of inference mode count no versions, and a compiler turns the count into a
        # condition that fails in every call; there the trial's word must do.
        unversioned = torch.compiler.is_compiling() or x.is_inference()
        version = 0 if unversioned else x._version
        result, merged = self.result, self.merged
        if (
            result is None
            or self.x is not x
            or self.version != version
            or not self.waiting >> place & 1
        ):
            result = self.call(x, merged.weight, merged.bias)
            self.x, self.version, self.result = x, version, result
            self.waiting = (1 << len(merged.spans)) - 1
        self.waiting &= ~(1 << place)
        if not self.waiting:
            self.x = self.result = None
        return result.narrow(-1, *merged.spans[place])


def _is_plain_linear(call: Call) -> bool:
    return type(call.module) is nn.Linear and call.alone and "forward" not in vars(call.module)


def _mergeable(linears: Sequence[Any], taken: set[int]) -> bool:
    """Same input size, dtype and place; no weight in two groups or twice in this one."""
    weights = [part.weight for part in linears]
    alike = {(w.shape[1], w.dtype, w.device) for w in weights}
    biases = [part.bias for part in linears if part.bias is not None]
    parameters = {id(parameter) for parameter in (*weights, *biases)}
    return (
        len(alike) == 1
        and len(parameters) == len(weights) + len(biases)
        and not parameters & taken
        and all(b.dtype == weights[0].dtype for b in biases)
    )


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
