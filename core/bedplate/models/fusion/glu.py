# SPDX-License-Identifier: Apache-2.0
"""Feed-forward blocks with a gate: two products, one activation, one more product.

A module qualifies by its numbers: linears that read its input, and a last linear whose input
is an activation of the one times the other, bit for bit.  Gate and up become one matrix.

Shapes: T tokens, C hidden size, I inner size.
"""

from __future__ import annotations

__all__ = ["GluForm", "GluSite", "find_glus"]

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bedplate.contract import OpRequest, Support
from bedplate.models.fusion.merge import MergedLinear, merge_linears
from bedplate.models.fusion.site import Evidence, Shadow, Site, difference, tolerance
from bedplate.reference.ops import ACTIVATIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bedplate.models.fusion.calls import Call
    from bedplate.models.fusion.norm import NormedInput
    from bedplate.models.fusion.site import Providers
    from bedplate.reference.ops import PartialProduct


_WHOLE = 1 << 25
"""Most numbers of the first product that are made at once."""
_SLICE = 1 << 24
"""Where there would be more, so many at a time: thousands of rows multiply no faster, each,
than some hundreds, and only take memory."""


class GluForm:
    """The block with its operations bound.

    Args:
        merged: Gate rows, then up rows.
        act: Activation of the gate.
        down: The last linear.
        providers: ``linear``, ``norm_linear`` and ``act_and_mul``.
    """

    def __init__(self, merged: MergedLinear, act: str, down: Any, providers: Providers) -> None:
        self.merged = merged
        self._act = act
        self._down = down
        self._linear = providers["linear"].call
        self._norm_linear = providers["norm_linear"].call
        self._act_and_mul = providers["act_and_mul"].call
        width = len(merged.weight)
        self._most_rows = _WHOLE // width
        self._slice_rows = 1 << max(1, _SLICE // width).bit_length() - 1

    def fits(self, x: Tensor) -> bool:
        """Whether so many rows ``[…, C]`` are taken at once."""
        return x.numel() <= self._most_rows * x.shape[-1]

    def run(self, x: Tensor) -> Tensor:
        """``[…, C]`` → ``[…, C]``; in slices where it does not fit."""
        if self.fits(x):
            return self._run_all(x)
        out = x.new_empty((*x.shape[:-1], self._down.out_features))
        self._run_slices(x, out)
        return out

    def run_over(self, x: Tensor) -> Tensor:
        """The same, in slices, of ``x`` that nobody reads any more: it gets the result."""
        if not x.is_contiguous() or self._down.out_features != x.shape[-1]:
            return self.run(x)
        self._run_slices(x, x)
        return x

    def _run_slices(self, x: Tensor, out: Tensor) -> None:
        """From ``x`` to ``out``, contiguous, perhaps the same."""
        rows, places = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        for begin in range(0, len(rows), self._slice_rows):
            some = slice(begin, begin + self._slice_rows)
            places[some] = self._run_all(rows[some])

    def _run_all(self, x: Tensor) -> Tensor:
        # No names for what lies between: it would live on while the next is made.
        out: Tensor = self._down_of(
            self._act_and_mul(self._linear(x, self.merged.weight, self.merged.bias), self._act),
            finish=True,
        )
        return out

    def run_normed(
        self,
        x: Tensor | PartialProduct,
        residual: Tensor | None,
        norm: NormedInput,
        finish: bool = True,
    ) -> tuple[Any, Tensor]:
        """The block of the norm of ``x + residual``, which fits, and that sum.

        The block's result is perhaps a product in parts, unless ``finish``.
        """
        inner, total = self._norm_linear(
            x, residual, norm.weight, norm.bias, norm.eps, norm.order,
            self.merged.weight, self.merged.bias, self._act,
        )  # fmt: skip
        return self._down_of(inner, finish), total

    def _down_of(self, inner: Tensor, finish: bool) -> Any:
        return self._linear(inner, self._down.weight, self._down.bias, finish)


def find_glus(calls: Sequence[Call]) -> list[GluSite]:
    """Every module whose output is a gated feed-forward block of its input."""
    sites = []
    for call in {call.path: call for call in reversed(calls) if not call.leaf}.values():
        parts = _parts(call, calls)
        if parts is not None:
            sites.append(GluSite(call, *parts))
    return sites[::-1]


class GluSite(Site):
    """One block.

    Args:
        call: The module's call.
        linears: Gate and up, or one linear that holds both.
        act: Activation of the gate.
        down: The last linear.
    """

    pattern = "glu"

    def __init__(self, call: Call, linears: Sequence[Any], act: str, down: Any) -> None:
        self.path = call.path
        self.module = call.module
        self.kind = f"glu {type(call.module).__name__} {act}"
        self.form: GluForm | None = None
        self._call = call
        self._linears, self._act, self._down = linears, act, down
        self._bound: GluForm | None = None

    def requests(self) -> tuple[OpRequest, ...]:
        """Products, the gate, and the product after a norm."""
        first = self._linears[0]
        dtype = str(first.weight.dtype).removeprefix("torch.")
        wide = sum(linear.out_features for linear in self._linears)
        size = {"in": first.in_features, "out": wide, "act": self._act}
        return (
            OpRequest(op="linear", dtype=dtype, attributes=size),
            OpRequest(op="norm_linear", dtype=dtype, attributes=size),
            OpRequest(op="act_and_mul", dtype=dtype, attributes={"act": self._act}),
        )

    def pays(self, providers: Providers) -> Support:
        """Yes with a kernel for the gate; plain torch would compute what the module does."""
        if providers["act_and_mul"].kind == "reference":
            return Support.no("only the reference has its parts, which is what the module does")
        return Support.yes(f"gate and up in one product, {self._act} by a kernel")

    @torch.no_grad()
    def verify(self, providers: Providers) -> Evidence:
        """The form against the module on the trial's input."""
        form = GluForm(merge_linears(self._linears), self._act, self._down, providers)
        self._bound = form
        want = self.module(self._call.x)  # its result may have been changed in place since
        worst, limit = difference(form.run(self._call.x), want), tolerance(want.dtype)
        text = f"largest relative difference {worst:.1e}, limit {limit:.1e}"
        return Evidence(ok=worst <= limit, text=text)

    def apply(self) -> None:
        """Merge the storage and shadow the module."""
        if self._bound is None:
            return
        self._bound.merged.adopt()
        self.form = self._bound
        Shadow(self.form.run).put(self.module)

    def revert(self) -> None:
        """Uncover the module; its weights stay views, which nothing can tell."""
        self.form = None
        Shadow.remove(self.module)


def _parts(call: Call, calls: Sequence[Call]) -> tuple[list[Any], str, Any] | None:
    """Gate and up, activation, and last linear of a module that is a gated block."""
    inside = [c for c in calls if c.path.startswith(f"{call.path}.")]
    linears = [c for c in inside if type(c.module) is nn.Linear]
    if not call.alone or not isinstance(call.output, Tensor) or len(linears) not in (2, 3):
        return None
    *reading, last = linears
    if last.result is not call.output or any(c.x is not call.x for c in reading):
        return None
    outputs = [c.result for c in reading]
    for order in ((0, 1), (1, 0)) if len(reading) == 2 else ((0,),):
        made = [outputs[place] for place in order]
        halves = made if len(made) == 2 else list(made[0].chunk(2, dim=-1))  # type: ignore[union-attr]
        act = _activation(halves, last.x)
        if act is not None:
            return [reading[place].module for place in order], act, last.module
    return None


def _activation(halves: Sequence[Tensor | None], inner: Tensor) -> str | None:
    gate, up = halves
    if gate is None or up is None or gate.shape != up.shape or gate.shape != inner.shape:
        return None
    for name, act in ACTIVATIONS.items():
        if torch.equal(act(gate) * up, inner):
            return name
    return None
