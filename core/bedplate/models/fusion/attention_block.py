# SPDX-License-Identifier: Apache-2.0
"""Attention blocks: one product, then norm, rotation and write in one, attention, one product.

A module qualifies by its numbers: what reached the attention interface must follow from one
of the forms tried here, applied to the outputs of the linears that read the module's input.
Queries, keys and values become parts of one product, and in decode passes the operation that
turns them writes keys and values to the cache as well.

Shapes: T tokens, C hidden size, H query heads, K key/value heads, D head size, Dv value size,
W = H·D + K·D + K·Dv columns of the product.
"""

from __future__ import annotations

__all__ = ["AttentionForm", "AttentionSite", "find_attention_blocks"]

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bedplate.contract import OpRequest, Support
from bedplate.models.fusion.merge import MergedLinear, merge_linears
from bedplate.models.fusion.rope import RopeTables, angles_of
from bedplate.models.fusion.site import Evidence, Shadow, Site, difference, tolerance
from bedplate.reference.rope import HeadNorm, qk_norm_rope_write

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bedplate.contract.attention import AttentionCallSpec
    from bedplate.models.bridge import AttentionBridge
    from bedplate.models.fusion.calls import Call
    from bedplate.models.fusion.norm import NormedInput, NormSite
    from bedplate.models.fusion.site import Providers
    from bedplate.models.fusion.trial import Attended, Trial
    from bedplate.reference.ops import PartialProduct
    from bedplate.reference.rope import RopeTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the heads lie in a row of the product.

    Attributes:
        starts: First column of queries, keys and values.
        steps: Columns from one head to the next, of queries, keys and values.
    """

    starts: tuple[int, int, int]
    steps: tuple[int, int, int]

    def heads(self, product: Tensor, call: AttentionCallSpec) -> tuple[Tensor, Tensor, Tensor]:
        """Views ``[T, H, D]``, ``[T, K, D]`` and ``[T, K, Dv]`` of a product ``[T, W]``."""
        first, row = product.storage_offset(), product.stride(0)
        shapes = (
            (call.num_heads, call.head_dim),
            (call.num_kv_heads, call.head_dim),
            (call.num_kv_heads, call.value_dim),
        )
        q, k, v = (
            product.as_strided((product.shape[0], *shape), (row, step, 1), first + start)
            for shape, start, step in zip(shapes, self.starts, self.steps, strict=True)
        )
        return q, k, v


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """How queries and keys come out of the product.

    Attributes:
        layout: Where they lie.
        norm: Norm of the heads, or ``None``.
        rope: Rotation, or ``None``.
    """

    layout: Layout
    norm: HeadNorm | None
    rope: RopeTable | None

    def describe(self) -> str:
        """A few words for people."""
        rope, norm = self.rope, self.norm
        turned = "no rotation" if rope is None else f"{rope.style} rotation"
        if norm is None:
            return turned
        return f"{'flat' if norm.flat else 'head'} norm {norm.order}, {turned}"


class AttentionForm:
    """The block with its operations bound.

    Args:
        module: The attention module; its calls are counted under it.
        bridge: Knows the step under way.
        merged: The matrix that makes queries, keys and values.
        heads: How they come out of the product.
        sinks: The module's sinks, if it has any.
        output: The last linear.
        providers: ``linear``, ``norm_linear`` and ``qk_norm_rope_write``.
    """

    def __init__(
        self,
        module: nn.Module,
        bridge: AttentionBridge,
        merged: MergedLinear,
        heads: Heads,
        sinks: Tensor | None,
        output: Any,
        providers: Providers,
    ) -> None:
        self.merged = merged
        self._module, self._bridge = module, bridge
        self._heads, self._sinks = heads, sinks
        self._output = output
        self._linear = providers["linear"].call
        self._norm_linear = providers["norm_linear"].call
        self._turn = providers["qk_norm_rope_write"].call

    def run(self, x: Tensor, finish: bool = True) -> Any:
        """``[1, T, C]`` → ``[1, T, C]``; unless ``finish``, perhaps a product in parts."""
        return self._attend(self._linear(x, self.merged.weight, self.merged.bias), finish)

    def run_normed(
        self,
        x: Tensor | PartialProduct,
        residual: Tensor | None,
        norm: NormedInput,
        finish: bool = True,
    ) -> tuple[Any, Tensor]:
        """The block of the norm of ``x + residual``, and that sum."""
        product, total = self._norm_linear(
            x, residual, norm.weight, norm.bias, norm.eps, norm.order,
            self.merged.weight, self.merged.bias,
        )  # fmt: skip
        return self._attend(product, finish), total

    def _attend(self, product: Tensor, finish: bool) -> Any:
        step, call = self._bridge.next_call(self._module)
        batch, pool = step.batch, step.kv_pool
        rows = product.view(-1, product.shape[-1])
        q, k, v = self._heads.layout.heads(rows, call)
        norm, rope = self._heads.norm, self._heads.rope
        if pool is not None and batch.mode.is_decode():
            keys, values = pool.key(call.call_id), pool.value(call.call_id)
            self._turn(q, k, v, batch.positions, rope, norm, keys, values, batch.out_cache_loc)
            out = step.attention.forward(q, None, None, call, batch, sinks=self._sinks)
        else:
            self._turn(q, k, v, batch.positions, rope, norm)
            out = step.attention.forward(q, k, v, call, batch, sinks=self._sinks)
        flat = out.reshape(*product.shape[:-1], -1)
        return self._linear(flat, self._output.weight, self._output.bias, finish)


def find_attention_blocks(
    calls: Sequence[Call], norms: Sequence[NormSite], trial: Trial
) -> list[AttentionSite]:
    """Every attention module that a form reproduces; one call of its own keys and values."""
    spec = trial.model.spec
    if spec.position_offset or spec.position_modules or spec.past_length_seam:
        return []
    made = {call.path: call for call in calls}
    often = [attended.call.module for attended in trial.attended]
    positions = trial.positions
    tables = RopeTables(calls, positions, trial.max_positions)
    sites = []
    for attended in trial.attended:
        call = made.get(attended.call.module)
        plain = attended.call.alias_of is None and not attended.call.value_in_key
        if call is None or not plain or often.count(attended.call.module) > 1:
            continue
        found = _Search(call, attended, calls, norms, tables, positions).find()
        if found is not None:
            sites.append(AttentionSite(call, trial.model.bridge, attended, positions, *found))
    return sites


class AttentionSite(Site):
    """One block.

    Args:
        call: The attention module's call.
        bridge: Of the model.
        attended: What reached the attention interface.
        positions: Of the trial's tokens.
        linears: Those that make queries, keys and values, in the order of the layout.
        heads: The form that was found.
        output: The last linear.
    """

    pattern = "attention_block"

    def __init__(
        self,
        call: Call,
        bridge: AttentionBridge,
        attended: Attended,
        positions: Tensor,
        linears: Sequence[Any],
        heads: Heads,
        output: Any,
    ) -> None:
        self.path = call.path
        self.module = call.module
        self.kind = f"attention_block {type(call.module).__name__}"
        self.form: AttentionForm | None = None
        self._call, self._bridge, self._attended = call, bridge, attended
        self._positions = positions
        self._linears, self._heads, self._output = linears, heads, output
        self._bound: AttentionForm | None = None

    def requests(self) -> tuple[OpRequest, ...]:
        """Products, the product after a norm, and what happens to the heads."""
        first, spec = self._linears[0], self._attended.call
        dtype = str(first.weight.dtype).removeprefix("torch.")
        size = {
            "in": first.in_features,
            "out": sum(linear.out_features for linear in self._linears),
        }
        rope, norm = self._heads.rope, self._heads.norm
        head = {
            "head_dim": spec.head_dim,
            "value_dim": spec.value_dim,
            "heads": spec.num_heads,
            "rotated": 0 if rope is None else 2 * rope.cos.shape[-1],
            "norm": "" if norm is None else norm.order,
            "flat": norm is not None and norm.flat,
        }
        return (
            OpRequest(op="linear", dtype=dtype, attributes=size),
            OpRequest(op="norm_linear", dtype=dtype, attributes=size | {"act": None}),
            OpRequest(op="qk_norm_rope_write", dtype=dtype, attributes=head),
        )

    def pays(self, providers: Providers) -> Support:
        """Yes with a kernel for the heads; plain torch would compute what the module does."""
        if providers["qk_norm_rope_write"].kind == "reference":
            return Support.no("only the reference has its parts, which is what the module does")
        return Support.yes(f"one product; {self._heads.describe()} and write in one kernel")

    @torch.no_grad()
    def verify(self, providers: Providers) -> Evidence:
        """What the operations make of the trial's input, against what attention was given."""
        merged = merge_linears(self._linears)
        attended = self._attended
        self._bound = AttentionForm(
            self.module, self._bridge, merged, self._heads, attended.sinks, self._output,
            providers,
        )  # fmt: skip
        product = providers["linear"].call(self._call.x, merged.weight, merged.bias)
        rows = product.view(-1, product.shape[-1])
        q, k, v = self._heads.layout.heads(rows, attended.call)
        turn = providers["qk_norm_rope_write"].call
        turn(q, k, v, self._positions, self._heads.rope, self._heads.norm)
        pairs = ((q, attended.q), (k, attended.k), (v, attended.v))
        worst = max(difference(got, want) for got, want in pairs if want is not None)
        limit = 2 * tolerance(rows.dtype)  # a product and two roundings of the rotation
        text = f"largest relative difference {worst:.1e}, limit {limit:.1e}"
        return Evidence(ok=worst <= limit, text=text)

    def apply(self) -> None:
        """Merge the storage and shadow the module."""
        if self._bound is None:
            return
        self._bound.merged.adopt()
        self.form = self._bound
        Shadow(self._forward).put(self.module)

    def revert(self) -> None:
        """Uncover the module; its weights stay views, which nothing can tell."""
        self.form = None
        Shadow.remove(self.module)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module is called: the hidden states, and much that the form does not need."""
        assert self.form is not None  # only then is the module shadowed
        out = self.form.run(args[0] if args else kwargs["hidden_states"])
        whole = self._call.output
        return (out, *whole[1:]) if isinstance(whole, tuple) else out


class _Search:
    """Tries the forms on one attention module."""

    def __init__(
        self,
        call: Call,
        attended: Attended,
        calls: Sequence[Call],
        norms: Sequence[NormSite],
        tables: RopeTables,
        positions: Tensor,
    ) -> None:
        self._positions = positions
        self._call, self._attended = call, attended
        self._inside = [c for c in calls if c.path.startswith(f"{call.path}.")]
        self._norms = {site.path: site for site in norms}
        self._tables = tables

    def find(self) -> tuple[list[Any], Heads, Any] | None:
        """Linears, form and last linear; ``None`` if no form fits."""
        output = self._output()
        reading = [
            c
            for c in self._inside
            if type(c.module) is nn.Linear and c.alone and c.x is self._call.x
        ]
        if output is None or not self._other_outputs_are_none():
            return None
        for linears, layout in self._layouts(reading):
            product = torch.cat([c.result for c in linears], dim=-1)  # type: ignore[misc]
            rows = product.reshape(-1, product.shape[-1])
            heads = self._heads(layout, rows)
            if heads is not None:
                return [c.module for c in linears], heads, output
        return None

    def _other_outputs_are_none(self) -> bool:
        output = self._call.output
        return not isinstance(output, tuple) or all(part is None for part in output[1:])

    def _output(self) -> Any:
        """The linear that turns the attended values into the module's result."""
        want = self._attended.out
        for call in self._inside:
            if (
                type(call.module) is nn.Linear
                and call.result is self._call.result
                and torch.equal(call.x.reshape(len(want), -1), want.reshape(len(want), -1))
            ):
                return call.module
        return None

    def _layouts(self, reading: Sequence[Call]) -> Iterator[tuple[Sequence[Call], Layout]]:
        spec = self._attended.call
        heads, kv, size, value = (
            spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.value_dim
        )  # fmt: skip
        widths = (heads * size, kv * size, kv * value)
        behind = Layout(starts=(0, widths[0], widths[0] + widths[1]), steps=(size, size, value))
        if len(reading) == 3:
            for order in ((0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0), (2, 0, 1)):
                chosen = [reading[place] for place in order]
                if tuple(_width(c) for c in chosen) == widths:
                    yield chosen, behind
        if len(reading) == 1 and _width(reading[0]) == sum(widths):
            yield reading, behind
            if heads == kv:
                step = 2 * size + value
                yield reading, Layout(starts=(0, size, 2 * size), steps=(step,) * 3)

    def _heads(self, layout: Layout, product: Tensor) -> Heads | None:
        """The form that comes nearest, if it is near enough."""
        attended = self._attended
        _, k, v = layout.heads(product, attended.call)
        if attended.v is None or not torch.equal(v, attended.v):
            return None
        best, limit = None, tolerance(product.dtype)
        angles = angles_of(self._call)
        ropes: list[RopeTable | None] = [None]
        if angles is not None:
            ropes += self._tables.candidates(angles, product.dtype)
        for norm in self._head_norms(layout, product):
            for rope in ropes:
                if rope is not None and 2 * rope.cos.shape[-1] > attended.call.head_dim:
                    continue
                q, k, v = layout.heads(product.clone(), attended.call)
                qk_norm_rope_write(q, k, v, self._positions, rope, norm)
                worst = max(
                    difference(q, attended.q),
                    float("inf") if attended.k is None else difference(k, attended.k),
                )
                if worst < limit or (best is None and worst == limit):
                    best, limit = Heads(layout=layout, norm=norm, rope=rope), worst
                if worst == 0.0:
                    return best
        return best

    def _head_norms(self, layout: Layout, product: Tensor) -> Iterator[HeadNorm | None]:
        """Norms that were given these queries and these keys."""
        q, k, _ = layout.heads(product, self._attended.call)
        q_call, k_call = (
            next((c for c in self._inside if c.path in self._norms and _holds(c, heads)), None)
            for heads in (q, k)
        )
        if q_call is None or k_call is None:
            yield None
            return
        q_norm, k_norm = self._norms[q_call.path], self._norms[k_call.path]
        if (q_norm.order, q_norm.eps) == (k_norm.order, k_norm.eps):
            flat = q_call.x.shape[-1] != self._attended.call.head_dim
            yield HeadNorm(
                q_weight=q_norm.weight, k_weight=k_norm.weight, eps=q_norm.eps,
                order=q_norm.order, flat=flat,
            )  # fmt: skip


def _width(linear: Call) -> int:
    module: Any = linear.module
    return int(module.out_features)


def _holds(call: Call, heads: Tensor) -> bool:
    """Whether a norm was given exactly these heads, one by one or all of a token together."""
    if call.x.shape[-1] not in (heads.shape[-1], heads.shape[1] * heads.shape[2]):
        return False
    given = call.x
    if given.dim() == 4 and given.shape[1] == heads.shape[1] != given.shape[2]:
        given = given.transpose(1, 2)  # head-major, as some families keep them
    return given.numel() == heads.numel() and torch.equal(given.reshape(heads.shape), heads)
