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

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bedplate.contract import OpProvider, OpRequest, Support
from bedplate.models.fusion.site import Evidence, Shadow, Site, difference, tolerance

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bedplate.models.fusion.calls import Call

TRIAL_ROWS = 8


def find_siblings(calls: Sequence[Call]) -> list[SiblingSite]:
    """Groups of two or more plain linears of one parent that always share their input."""
    together: dict[tuple[str, int], list[Call]] = {}
    for call in calls:
        if type(call.module) is nn.Linear and call.alone and "forward" not in vars(call.module):
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
    """

    pattern = "siblings"

    def __init__(self, parent: str, members: dict[str, Any]) -> None:
        leaves = "+".join(path.rpartition(".")[2] for path in members)
        self.path = f"{parent}.{leaves}" if parent else leaves
        self.kind = f"siblings {leaves}"
        self._members: list[Any] = list(members.values())
        self._merged: _Merged | None = None

    def request(self) -> OpRequest:
        """``linear`` with the merged sizes."""
        first = self._members[0]
        attributes = {
            "in": first.in_features,
            "out": sum(m.out_features for m in self._members),
        }
        dtype = str(first.weight.dtype).removeprefix("torch.")
        return OpRequest(op="linear", dtype=dtype, attributes=attributes)

    def pays(self, provider: OpProvider) -> Support:
        """Yes, but for float32 by plain torch (``benchmarks.cases.fusion_patterns``)."""
        if provider.kind == "reference" and self._members[0].weight.dtype == torch.float32:
            return Support.no(
                "plain torch gains nothing from one float32 product: measured x1.00 with 1 "
                "token and x1.01 with 32, where bfloat16 has x1.03 and x1.04"
            )
        return Support.yes(
            f"one product instead of {len(self._members)}, by {provider.provider}"
        )

    @torch.no_grad()
    def verify(self, provider: OpProvider) -> Evidence:
        """Merged product against each member's own, on random rows."""
        first = self._members[0].weight
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(1, TRIAL_ROWS, first.shape[1], generator=generator)
        x = rows.to(first.device, first.dtype)
        self._merged = _merge(self._members, provider)
        worst = max(
            difference(self._merged.take(place, x), member(x))
            for place, member in enumerate(self._members)
        )
        limit = tolerance(first.dtype)
        if worst > limit:
            self._merged = None
        text = f"largest relative difference {worst:.1e}, limit {limit:.1e}"
        return Evidence(ok=worst <= limit, text=text)

    def apply(self) -> None:
        """Make the weights views of the merged matrix, and shadow the members."""
        merged = self._merged
        if merged is None:
            return
        merged.adopt(self._members)
        for place, member in enumerate(self._members):
            Shadow(merged.take, place).put(member)

    def revert(self) -> None:
        """Uncover the members; their weights stay views, which nothing can tell."""
        for member in self._members:
            Shadow.remove(member)


@dataclass(slots=True)
class _Merged:
    """The merged matrix, and the product that members still wait for.

    ``x`` is kept until every member took its part, so its identity cannot be reused.
    """

    call: Callable[..., Tensor]
    weight: Tensor
    bias: Tensor | None
    spans: list[tuple[int, int]]  # first row and number of rows of each member
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
        result = self.result
        if (
            result is None
            or self.x is not x
            or self.version != version
            or not self.waiting >> place & 1
        ):
            result = self.call(x, self.weight, self.bias)
            self.x, self.version, self.result = x, version, result
            self.waiting = (1 << len(self.spans)) - 1
        self.waiting &= ~(1 << place)
        if not self.waiting:
            self.x = self.result = None
        return result.narrow(-1, *self.spans[place])

    def adopt(self, members: Sequence[Any]) -> None:
        """Let the members' parameters, the same objects, live in the merged storage."""
        for member, span in zip(members, self.spans, strict=True):
            member.weight.data = self.weight.narrow(0, *span)
            if member.bias is not None and self.bias is not None:
                member.bias.data = self.bias.narrow(0, *span)


def _merge(members: Sequence[Any], provider: OpProvider) -> _Merged:
    weight = torch.cat([member.weight.detach() for member in members])
    sizes = [member.out_features for member in members]
    bias = None
    if any(member.bias is not None for member in members):
        none = [weight.new_zeros(size) for size in sizes]
        given = [none[i] if m.bias is None else m.bias.detach() for i, m in enumerate(members)]
        bias = torch.cat(given)
    starts = itertools.accumulate(sizes, initial=0)
    return _Merged(provider.call, weight, bias, list(zip(starts, sizes, strict=False)))


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
