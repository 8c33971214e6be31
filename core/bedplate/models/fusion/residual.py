# SPDX-License-Identifier: Apache-2.0
"""Decoder layers: which sums and norms stand around attention and feed-forward.

A layer qualifies by its numbers: its output must be one of the sums tried here, bit for bit.
Then a sum and the norm after it are one operation, also where the norm belongs to the next
layer: the sum is left to whoever reads the layer's output, if that is known to do it.

Shapes: T tokens, C hidden size.
"""

from __future__ import annotations

__all__ = ["FinalNormSite", "LayerSite", "find_final_norm", "find_layers"]

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from bedplate.contract import OpRequest, Support
from bedplate.models.fusion.norm import KnownNorms
from bedplate.models.fusion.site import Evidence, Shadow, Site, difference, tolerance

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bedplate.models.bridge import AttentionBridge
    from bedplate.models.fusion.attention_block import AttentionSite
    from bedplate.models.fusion.calls import Call
    from bedplate.models.fusion.glu import GluForm, GluSite
    from bedplate.models.fusion.norm import NormedInput, NormSite
    from bedplate.models.fusion.site import Providers
    from bedplate.reference.ops import PartialProduct


class Reader(Protocol):
    """Whoever reads a layer's output."""

    @property
    def adds_residual(self) -> bool:
        """Whether it adds, now, what the layer left to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerForm:
    """The sums of one layer.

    With ``parallel`` the output is x + a + m, where a attends to the norm of x and m is the
    feed-forward block of the same or another norm of x; else h = x + a, and the output is
    h + m, where m is the block of the norm of h.

    Attributes:
        parallel: Which of the two.
        before: Norm before attention, or ``None``.
        between: Norm before the block; ``None`` where it reads the sum, or what attention
            reads if ``parallel``.
        after_attention: Norm of a, or ``None``.
        after_block: Norm of m, or ``None``.
        factor: Multiplies a and m before they are added.
        block: The module of the block.
    """

    parallel: bool
    before: NormedInput | None
    between: NormedInput | None
    after_attention: NormedInput | None
    after_block: NormedInput | None
    factor: float
    block: nn.Module

    def describe(self) -> str:
        """A few words for people."""
        norms = (self.before, self.between, self.after_attention, self.after_block)
        count = sum(norm is not None for norm in norms)
        kind = "parallel" if self.parallel else "in sequence"
        factor = "" if self.factor == 1.0 else f", factor {self.factor}"
        return f"attention and block {kind}, {count} norms{factor}"


def find_layers(
    calls: Sequence[Call],
    norms: Sequence[NormSite],
    attentions: Sequence[AttentionSite],
    blocks: Sequence[GluSite],
    bridge: AttentionBridge,
) -> list[LayerSite]:
    """The parents of attention modules whose sums are known, in order."""
    known = KnownNorms(norms)
    made = {call.path: call for call in calls}
    gated = {site.path: site for site in blocks}
    sites: list[LayerSite] = []
    for attention in attentions:
        layer = made.get(attention.path.rpartition(".")[0])
        if layer is None:
            continue
        form = _find_form(layer, made[attention.path], calls, known)
        if form is not None:
            block = next((s for s in gated.values() if s.module is form.block), None)
            sites.append(LayerSite(layer, form, attention, block, bridge))
    for site, following in pairwise(sites):
        if following.call.x is site.call.result and following.form.before is not None:
            site.reader = following
    return sites


def find_final_norm(
    calls: Sequence[Call],
    norms: Sequence[NormSite],
    layers: Sequence[LayerSite],
    bridge: AttentionBridge,
) -> list[FinalNormSite]:
    """The norm that reads the last layer's output."""
    known = KnownNorms(norms)
    if not layers:
        return []
    last = layers[-1]
    for call in calls:
        norm = known.of(call) if call.leaf and call.x is last.call.result else None
        if norm is not None:
            site = FinalNormSite(call, norm, bridge)
            last.reader = site
            return [site]
    return []


class LayerSite(Site):
    """One layer.

    Args:
        call: The layer's call.
        form: Its sums.
        attention: Its attention block.
        block: Its feed-forward block where that is gated and fused.
        bridge: Knows the step under way.
    """

    pattern = "layer"

    def __init__(
        self,
        call: Call,
        form: LayerForm,
        attention: AttentionSite,
        block: GluSite | None,
        bridge: AttentionBridge,
    ) -> None:
        self.path = call.path
        self.kind = f"layer {type(call.module).__name__} {form.describe()}"
        self.call, self.form = call, form
        self.reader: Reader | None = None
        self._attention, self._block, self._bridge = attention, block, bridge
        self._add_norm: Any = None
        self._applied = False

    @property
    def adds_residual(self) -> bool:
        """Whether the form is in use and begins with a norm."""
        return self._applied and self.form.before is not None

    def requests(self) -> tuple[OpRequest, ...]:
        """A sum with the norm after it, and the same with the product after that."""
        norm = self.form.between or self.form.before
        dtype = str(self.call.x.dtype).removeprefix("torch.")
        size = self.call.x.shape[-1]
        order = "no_weight" if norm is None else norm.order
        attributes = {"size": size, "order": order}
        product = {"in": size, "out": size, "order": order, "act": None}
        return (
            OpRequest(op="add_norm", dtype=dtype, attributes=attributes),
            OpRequest(op="norm_linear", dtype=dtype, attributes=product),
        )

    def pays(self, providers: Providers) -> Support:
        """Yes, if the attention block is fused and a kernel adds and norms."""
        if self._attention.form is None:
            return Support.no("its attention block is not fused")
        if providers["add_norm"].kind == "reference":
            return Support.no("only the reference has its parts, which is what the module does")
        return Support.yes(f"{self.form.describe()}; sums with the norms after them")

    @torch.no_grad()
    def verify(self, providers: Providers) -> Evidence:
        """The sum and norm before the block, and norm and product, on the trial's numbers."""
        self._add_norm = providers["add_norm"].call
        worst = 0.0
        x = self.call.x
        attention = self._attention.form
        for norm in (self.form.before, self.form.between):
            if norm is None or attention is None:
                continue
            got, total = _apply(self._add_norm, x, x, norm)
            want = norm.of(x + x)
            worst = max(worst, difference(got, want), difference(total, x + x))
        if self.form.before is not None and attention is not None:
            norm, merged = self.form.before, attention.merged
            got, _ = providers["norm_linear"].call(
                x,
                None,
                norm.weight,
                norm.bias,
                norm.eps,
                norm.order,
                merged.weight,
                merged.bias,
            )
            want = functional.linear(norm.of(x), merged.weight, merged.bias)
            worst = max(worst, difference(got, want))
        limit = tolerance(x.dtype)
        text = f"largest relative difference {worst:.1e}, limit {limit:.1e}"
        return Evidence(ok=worst <= limit, text=text)

    def apply(self) -> None:
        """Shadow the layer."""
        if self._add_norm is None:
            return
        self._applied = True
        if self._is_last:
            self._bridge.trims = True
        Shadow(self._parallel if self.form.parallel else self._sequential).put(self.call.module)

    def revert(self) -> None:
        """Uncover the layer."""
        self._applied = False
        if self._is_last:
            self._bridge.trims = False
        Shadow.remove(self.call.module)

    def _sequential(self, *args: Any, **kwargs: Any) -> Any:
        """``[1, T, C]`` → ``[1, T, C]``, or its stream where the reader adds the rest."""
        form = self.form
        last = self._deferred and form.after_block is None
        wanted = self._bridge.current.take_wanted() if self._is_last else None
        a, h = self._attend(_input(args, kwargs), whole=wanted is not None)
        if wanted is not None:
            a, h = a[:, wanted], h[:, wanted]
        a = self._scaled(a, form.after_attention)
        if form.between is None:
            h = h + a
            m = self._run_block(h)
        elif (glu := self._glu) is not None and glu.fits(h):
            finish = not last or form.factor != 1.0
            m, h = glu.run_normed(a, h, form.between, finish)
        else:
            # The old ones are let go of before the block, which takes the most memory.
            a, h = _apply(self._add_norm, a, h, form.between)
            m = self._run_block(a) if glu is None else glu.run_over(a)
        return self._leave(self._scaled(m, form.after_block), h)

    def _parallel(self, *args: Any, **kwargs: Any) -> Any:
        """As ``_sequential``, for layers whose two parts read the same."""
        form, attention = self.form, self._attention.form
        x, residual = self._bridge.current.take_deferred(_input(args, kwargs))
        assert form.before is not None  # a parallel form has it
        assert attention is not None
        normed, x = _apply(self._add_norm, x, residual, form.before)
        a = attention.run(normed)
        if form.between is not None:
            normed, _ = _apply(self._add_norm, x, None, form.between)
        return self._leave(a + self._run_block(normed), x)

    def _attend(self, x: Tensor, *, whole: bool) -> tuple[Any, Tensor]:
        """Attention's result, in parts unless ``whole``, and the stream before it."""
        attention, form = self._attention.form, self.form
        assert attention is not None
        normed_next = form.after_attention is not None or form.between is not None
        finish = whole or not normed_next
        finish |= form.after_attention is None and form.factor != 1.0
        if form.before is None:
            return attention.run(x, finish), x
        part, residual = self._bridge.current.take_deferred(x)
        return attention.run_normed(part, residual, form.before, finish)

    def _scaled(self, part: Any, norm: NormedInput | None) -> Any:
        if norm is not None:
            part, _ = _apply(self._add_norm, part, None, norm)
        return part if self.form.factor == 1.0 else part * self.form.factor

    def _run_block(self, x: Tensor) -> Tensor:
        out = self.form.block(x)
        part: Tensor = out[0] if isinstance(out, tuple) else out
        return part

    @property
    def _glu(self) -> GluForm | None:
        """The block where it is gated and fused."""
        return None if self._block is None else self._block.form

    @property
    def _is_last(self) -> bool:
        """Whether only a norm and the head come after it, which take each token alone."""
        return isinstance(self.reader, FinalNormSite) and not self.form.parallel

    @property
    def _deferred(self) -> bool:
        """Whether the reader adds the last sum."""
        return self.reader is not None and self.reader.adds_residual

    def _leave(self, part: Any, stream: Tensor) -> Any:
        """The sum; or the stream, where the reader will add."""
        if self._deferred:
            self._bridge.current.deferred = (stream, part, stream)
            out = stream
        else:
            out = stream + part
        return (out,) if isinstance(self.call.output, tuple) else out


class FinalNormSite(Site):
    """The norm after the last layer, which adds what that layer left to it.

    Args:
        call: The norm's call.
        norm: Its numbers.
        bridge: Knows the step under way.
    """

    pattern = "final_norm"

    def __init__(self, call: Call, norm: NormedInput, bridge: AttentionBridge) -> None:
        self.path = call.path
        self.kind = f"final_norm {type(call.module).__name__}"
        self._call, self._norm, self._bridge = call, norm, bridge
        self._add_norm: Any = None
        self._before: Any = None
        self._applied = False

    @property
    def adds_residual(self) -> bool:
        """Whether the form is in use."""
        return self._applied

    def requests(self) -> tuple[OpRequest, ...]:
        """A sum with the norm after it."""
        dtype = str(self._call.x.dtype).removeprefix("torch.")
        attributes = {"size": self._call.x.shape[-1], "order": self._norm.order}
        return (OpRequest(op="add_norm", dtype=dtype, attributes=attributes),)

    def pays(self, providers: Providers) -> Support:
        """Yes, with a kernel."""
        if providers["add_norm"].kind == "reference":
            return Support.no("only the reference has it, which computes what the module does")
        return Support.yes("adds the last layer's part while it norms")

    @torch.no_grad()
    def verify(self, providers: Providers) -> Evidence:
        """The operation against plain torch on the trial's numbers."""
        self._add_norm = providers["add_norm"].call
        x = self._call.x
        got, _ = _apply(self._add_norm, x, x, self._norm)
        worst, limit = difference(got, self._norm.of(x + x)), tolerance(x.dtype)
        text = f"largest relative difference {worst:.1e}, limit {limit:.1e}"
        return Evidence(ok=worst <= limit, text=text)

    def apply(self) -> None:
        """Shadow the norm, whatever shadows it already."""
        if self._add_norm is None:
            return
        self._before = vars(self._call.module).get("forward")
        self._applied = True
        Shadow(self._forward).put(self._call.module)

    def revert(self) -> None:
        """Put back what was there."""
        if not self._applied:
            return
        self._applied = False
        Shadow.remove(self._call.module)
        if self._before is not None:
            self._before.put(self._call.module)

    def _forward(self, x: Tensor) -> Tensor:
        part, residual = self._bridge.current.take_deferred(x)
        normed, _ = _apply(self._add_norm, part, residual, self._norm)
        return normed


def _find_form(
    layer: Call, attention: Call, calls: Sequence[Call], norms: KnownNorms
) -> LayerForm | None:
    """The sums of a layer, if they are known."""
    output = layer.output
    if layer.result is None or (isinstance(output, tuple) and len(output) > 1):
        return None
    children = [c for c in calls if c.path.rpartition(".")[0] == layer.path]
    around = [(c, norm) for c in children if c.leaf and (norm := norms.of(c)) is not None]
    taken = {id(c) for c, _ in around} | {id(attention)}
    candidates = [
        c
        for c in children
        if id(c) not in taken and c.alone and c.result is not None and c.result is not c.x
    ]
    for block in candidates:
        for form in _forms(layer, attention, block, around):
            return form
    return None


def _forms(
    layer: Call, attention: Call, block: Call, around: Sequence[tuple[Call, NormedInput]]
) -> Iterator[LayerForm]:
    """Forms whose numbers are those of the layer."""
    x, out = layer.x, layer.result

    def making(result: Tensor) -> tuple[Tensor, NormedInput | None]:
        """What was normed to make ``result``, and how; itself where nothing was."""
        return next(((c.x, n) for c, n in around if c.result is result), (result, None))

    def after(part: Tensor | None) -> tuple[Any, NormedInput | None]:
        return next(((c.result, n) for c, n in around if c.x is part), (part, None))

    source, before = making(attention.x)
    if source is not x:
        return
    a, after_attention = after(attention.result)
    m, after_block = after(block.result)
    stream, between = making(block.x)
    for factor in _factors(layer.module):
        a_part, m_part = (part if factor == 1.0 else part * factor for part in (a, m))
        shared: dict[str, Any] = {
            "before": before, "after_attention": after_attention, "after_block": after_block,
            "factor": factor, "block": block.module,
        }  # fmt: skip
        if torch.equal(x + a_part, stream) and torch.equal(stream + m_part, out):  # type: ignore[arg-type]
            yield LayerForm(parallel=False, between=between, **shared)
        reads_x = stream is x or block.x is attention.x
        plain = factor == 1.0 and after_attention is None and after_block is None
        if before is None or not reads_x or not plain:
            continue
        sums = (a + m + x, m + a + x, x + a + m, x + m + a)
        if any(torch.equal(total, out) for total in sums):  # type: ignore[arg-type]
            other = None if block.x is attention.x else between
            yield LayerForm(parallel=True, between=other, **shared)


def _factors(layer: nn.Module) -> list[float]:
    """1, and every other number that the layer keeps."""
    kept = {v for v in vars(layer).values() if isinstance(v, float) and v not in (0.0, 1.0)}
    return [1.0, *sorted(kept)]


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return x


def _apply(
    operation: Any, x: Tensor | PartialProduct, residual: Tensor | None, norm: NormedInput
) -> tuple[Tensor, Tensor]:
    made: tuple[Tensor, Tensor] = operation(
        x, residual, norm.weight, norm.bias, norm.eps, norm.order
    )
    return made
