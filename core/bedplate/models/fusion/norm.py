# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square norms, recognised by how they round.

In bfloat16 the order of the cast and of the weight decides which of two near-equal tokens
wins, and families differ.  So a module is run on random bfloat16 data and compared bit for
bit with each known order; the order goes to the operation, which must keep it.
"""

from __future__ import annotations

__all__ = ["KnownNorms", "NormSite", "NormedInput", "find_norms", "rounding_order"]

from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bedplate.contract import OpRequest, Support
from bedplate.models.fusion.site import Evidence, Shadow, Site, difference, tolerance
from bedplate.reference.ops import RMS_NORM_ORDERS, add_norm, rms_norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bedplate.models.fusion.calls import Call
    from bedplate.models.fusion.site import Providers

# Rows so small that eps decides, ordinary ones, and large ones.
SCALES = (1e-3, 3e-2, 1.0, 30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormedInput:
    """How the input of a block comes from the residual stream.

    Attributes:
        weight: Of the norm, or ``None``.
        bias: Of a layer norm, or ``None``.
        eps: Of the norm.
        order: One of ``bedplate.reference.ops.NORM_ORDERS``.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    order: str

    def of(self, x: Tensor) -> Tensor:
        """The norm of ``[…, C]`` by plain torch."""
        return add_norm(x, None, self.weight, self.bias, self.eps, self.order)[0]


class KnownNorms:
    """Which modules are norms that the operation ``add_norm`` computes.

    Args:
        sites: The root-mean-square norms that were found.
    """

    def __init__(self, sites: Sequence[NormSite]) -> None:
        self._sites = {site.path: site for site in sites}

    def of(self, call: Call) -> NormedInput | None:
        """The numbers of the norm that was called, if it is one."""
        site = self._sites.get(call.path)
        if site is not None:
            return NormedInput(weight=site.weight, bias=None, eps=site.eps, order=site.order)
        module = call.module
        if type(module) is not nn.LayerNorm or call.result is None or not call.alone:
            return None
        norm = NormedInput(
            weight=module.weight, bias=module.bias, eps=module.eps, order="layer_norm"
        )
        return norm if torch.equal(norm.of(call.x), call.result) else None


def find_norms(calls: Sequence[Call]) -> list[NormSite]:
    """Every childless module that rounds as a known root-mean-square norm does."""
    known: dict[tuple[object, ...], tuple[str, float] | None] = {}
    first: dict[str, Call] = {}
    leaves = [call for call in calls if call.leaf]
    for call in leaves:
        first.setdefault(call.path, call)
    several = {call.path for call in leaves if not call.alone}
    sites = []
    for path, call in first.items():
        if path in several or not _may_be_norm(call.module, call.x):
            continue
        key = (_settings(call.module), call.x.shape[-1])
        if key not in known:
            known[key] = rounding_order(call.module, call.x.shape[-1])
        form = known[key]
        if form is not None:
            sites.append(NormSite(path, call.module, call.x, *form))
    return sites


def rounding_order(module: nn.Module, size: int) -> tuple[str, float] | None:
    """How ``module`` rounds, and its epsilon; ``None`` if it is no known norm.

    Works on a copy in bfloat16 on the host, with random weights, so that equal bits mean the
    same arithmetic and not a lucky weight of one.

    Args:
        module: Childless, called with one ``[…, E]`` tensor.
        size: E.
    """
    copy = deepcopy(module).to("cpu", torch.bfloat16)
    x = _rows(size, 0).bfloat16()
    weight = next(copy.parameters(), None)
    with torch.no_grad():
        if weight is not None:
            weight.copy_(1 + 0.5 * _rows(size, 2)[-2, 0])
        try:
            want = copy(x)
        except Exception:
            return None  # not a function of one such tensor
        for order in RMS_NORM_ORDERS if weight is not None else ("no_weight",):
            for eps in _epsilons(module):
                got = rms_norm(x, None if order == "no_weight" else weight, eps, order)
                if _same_bits(got, want):
                    return order, eps
    return None


class NormSite(Site):
    """One norm.

    Args:
        path: Its path.
        module: The norm.
        example: An input as the model gives it: dtype, device and last size count.
        order: Its rounding order.
        eps: Added to the mean square.

    Attributes:
        order: As given.
        eps: As given.
    """

    pattern = "norm"

    def __init__(
        self, path: str, module: nn.Module, example: Tensor, order: str, eps: float
    ) -> None:
        self.path = path
        self.kind = f"norm {type(module).__name__} {order}"
        self._module = module
        self._size = example.shape[-1]
        self._dtype, self._device = example.dtype, example.device
        self.order, self.eps = order, eps
        self._call: Shadow | None = None

    @property
    def weight(self) -> nn.Parameter | None:
        """The norm's weight, ``None`` for the order ``no_weight``."""
        return None if self.order == "no_weight" else next(self._module.parameters())

    def requests(self) -> tuple[OpRequest, ...]:
        """``rms_norm`` with the order that must be kept."""
        dtype = str(self._dtype).removeprefix("torch.")
        attributes = {"order": self.order, "size": self._size, "eps": self.eps}
        return (OpRequest(op="rms_norm", dtype=dtype, attributes=attributes),)

    def pays(self, providers: Providers) -> Support:
        """Yes with a kernel; the reference computes what the module computes."""
        provider = providers["rms_norm"]
        if provider.kind == "reference":
            return Support.no("only the reference has it, which computes what the module does")
        return Support.yes(f"one kernel by {provider.provider}, order {self.order}")

    @torch.no_grad()
    def verify(self, providers: Providers) -> Evidence:
        """The operation against the module with its own weights, on random data."""
        call = providers["rms_norm"].call
        self._call = Shadow(call, weight=self.weight, eps=self.eps, order=self.order)
        x = _rows(self._size, 1).to(self._device, self._dtype)
        got, want = self._call(x), self._module(x)
        if self._dtype in (torch.bfloat16, torch.float16):
            apart = int((got != want).sum()) if got.shape == want.shape else got.numel()
            same = got.dtype == want.dtype and apart == 0
            return Evidence(ok=same, text=f"{apart} of {want.numel()} results differ, limit 0")
        worst, limit = difference(got, want), tolerance(self._dtype)
        text = f"largest relative difference {worst:.1e}, limit {limit:.1e}"
        return Evidence(ok=worst <= limit, text=text)

    def apply(self) -> None:
        """Shadow the norm."""
        if self._call is not None:
            self._call.put(self._module)

    def revert(self) -> None:
        """Uncover the norm."""
        Shadow.remove(self._module)


@lru_cache(maxsize=16)
def _rows(size: int, seed: int) -> Tensor:
    """Random rows ``[scale, 3, size]`` of every scale."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(SCALES), 3, size, generator=generator)
    return x * torch.tensor(SCALES)[:, None, None]


def _same_bits(got: Tensor, want: object) -> bool:
    return isinstance(want, Tensor) and got.dtype == want.dtype and torch.equal(got, want)


def _may_be_norm(module: nn.Module, x: Tensor) -> bool:
    parameters = list(module.parameters())
    shapes_fit = [tuple(p.shape) for p in parameters] in ([], [(x.shape[-1],)])
    return (
        shapes_fit
        and x.is_floating_point()
        and x.dim() > 1
        and bool(_epsilons(module))
        and "forward" not in vars(module)
    )


def _settings(module: nn.Module) -> tuple[object, ...]:
    """Equal for norms that can only differ in the values of their weights."""
    plain = ((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)))
    return type(module), len(list(module.parameters())), *plain


def _epsilons(module: nn.Module) -> set[float]:
    """Every small number that the module calls an epsilon, whatever the exact name."""
    return {
        float(value)
        for name, value in vars(module).items()
        if "eps" in name and isinstance(value, float)
    }
