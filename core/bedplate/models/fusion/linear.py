# SPDX-License-Identifier: Apache-2.0
"""Single linears, such as the head, by the backend's own product.

Those that read one input together are merged instead (``siblings``), and those of fused
blocks belong to the blocks.
"""

from __future__ import annotations

__all__ = ["LinearSite", "find_linears"]

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from bedplate.contract import OpRequest, Support
from bedplate.models.fusion.site import Evidence, Shadow, Site, difference, tolerance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bedplate.models.fusion.calls import Call
    from bedplate.models.fusion.siblings import SiblingSite
    from bedplate.models.fusion.site import Providers


def find_linears(calls: Sequence[Call], siblings: Sequence[SiblingSite]) -> list[LinearSite]:
    """Every plain linear that no group has taken."""
    taken = {id(member) for site in siblings for member in site.members}
    return [
        LinearSite(call)
        for call in {call.path: call for call in calls}.values()
        if type(call.module) is nn.Linear
        and call.alone
        and "forward" not in vars(call.module)
        and id(call.module) not in taken
    ]


class LinearSite(Site):
    """One linear.

    Args:
        call: Its call.
    """

    pattern = "linear"

    def __init__(self, call: Call) -> None:
        self.path = call.path
        self._module: Any = call.module
        self._call = call
        size = f"{self._module.out_features}x{self._module.in_features}"
        self.kind = f"linear {size}"
        self._linear: Any = None

    def requests(self) -> tuple[OpRequest, ...]:
        """``linear`` of its size."""
        module = self._module
        dtype = str(module.weight.dtype).removeprefix("torch.")
        attributes = {"in": module.in_features, "out": module.out_features}
        return (OpRequest(op="linear", dtype=dtype, attributes=attributes),)

    def pays(self, providers: Providers) -> Support:
        """Yes with a kernel; the reference is what the module calls."""
        provider = providers["linear"]
        if provider.kind == "reference":
            return Support.no("only the reference has it, which is what the module calls")
        return Support.yes(f"product by {provider.provider}")

    @torch.no_grad()
    def verify(self, providers: Providers) -> Evidence:
        """The operation on the trial's input and on one row of it."""
        self._linear = providers["linear"].call
        module = self._module
        want = functional.linear(self._call.x, module.weight, module.bias)
        whole = self._linear(self._call.x, module.weight, module.bias)
        row = self._linear(self._call.x[..., :1, :], module.weight, module.bias)
        worst = max(difference(whole, want), difference(row, want[..., :1, :]))
        limit = tolerance(want.dtype)
        text = f"largest relative difference {worst:.1e}, limit {limit:.1e}"
        return Evidence(ok=worst <= limit, text=text)

    def apply(self) -> None:
        """Shadow the linear."""
        if self._linear is not None:
            module = self._module
            Shadow(self._linear, weight=module.weight, bias=module.bias).put(module)

    def revert(self) -> None:
        """Uncover the linear."""
        Shadow.remove(self._module)
