# SPDX-License-Identifier: Apache-2.0
"""What every part of a model was given and gave in one pass; and the same pass led by another.

A pass that is *led* gets, at every module and attention call, what the leading pass was given
there.  So its results differ by what that one part computes, and nothing accumulates.

Parts that a fused form has swallowed are not seen; the form's own module is.
"""

from __future__ import annotations

__all__ = ["Part", "Trace", "traced"]

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bedplate.contract.attention import AttentionBackend
from bedplate.reference.ops import PartialProduct

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.contract.attention import AttentionCallSpec
    from bedplate.contract.memory import KVPool
    from bedplate.models.adapter import HFModel

Part = tuple[str, int]
"""Path of a module or attention call, and which of its calls in the pass."""


@dataclass(slots=True, kw_only=True, eq=False)
class Trace:
    """One pass, copied to one device.

    Attributes:
        device: Where copies live.
        given: Part → first argument of a module, or queries, keys and values.
        gave: Part → what it returned, in the order in which parts finished.
    """

    device: torch.device
    given: dict[Part, tuple[Tensor | None, ...]] = field(default_factory=dict)
    gave: dict[Part, tuple[Tensor, ...]] = field(default_factory=dict)

    def keep(self, x: Tensor) -> Tensor:
        """A copy that nobody changes."""
        return x.detach().to(self.device, copy=True)


@contextmanager
def traced(
    model: HFModel,
    attention: AttentionBackend,
    kv_pool: KVPool | None,
    trace: Trace,
    leader: Trace | None = None,
) -> Iterator[None]:
    """Record the passes made inside; led by another trace where one is given.

    No layer leaves out tokens meanwhile: parts are compared token by token.

    Args:
        model: Gets hooks, and gives them back.
        attention: What it is bound to; bound again at the end.
        kv_pool: Likewise.
        trace: Filled.
        leader: A pass of the same model, on the device where this one runs.
    """
    hooks = _Hooks(model, trace, leader)
    handles = [
        handle
        for path, module in model.module.named_modules()
        if path
        for handle in (
            module.register_forward_pre_hook(hooks.before(path), with_kwargs=True),
            module.register_forward_hook(hooks.after(path)),
        )
    ]
    model.bind_attention(_TracedAttention(attention, trace, leader), kv_pool)
    trims, model.bridge.trims = model.bridge.trims, False
    try:
        yield
    finally:
        model.bridge.trims = trims
        model.bind_attention(attention, kv_pool)
        for handle in handles:
            handle.remove()


class _Hooks:
    """Hooks of modules, by path."""

    def __init__(self, model: HFModel, trace: Trace, leader: Trace | None) -> None:
        self._model = model
        self._trace = trace
        self._leader = leader
        self._begun: Counter[str] = Counter()
        self._open: dict[str, list[Part]] = {}

    def before(self, path: str) -> Any:
        """Keeps the input, or hands in the leader's."""

        def hook(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            part = (path, self._begun[path])
            self._begun[path] += 1
            self._open.setdefault(path, []).append(part)
            x = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(x, Tensor):
                return None
            if self._leader is None:
                self._trace.given[part] = (self._trace.keep(self._whole(x)),)
                return None
            return self._led(part, x, args, kwargs)

        return hook

    def after(self, path: str) -> Any:
        """Keeps the output."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            part = self._open[path].pop()
            found = tuple(self._trace.keep(self._whole(x)) for x in _tensors(output))
            if found:
                self._trace.gave[part] = found

        return hook

    def _led(
        self, part: Part, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        assert self._leader is not None
        (lead,) = self._leader.given.get(part, (None,))
        if lead is None or lead.shape != x.shape or lead.dtype != x.dtype:
            self._trace.given[part] = ()  # not comparable: it was given something else
            return None
        if args:
            return (lead, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": lead}

    def _whole(self, x: Tensor) -> Tensor:
        """With what a fused layer has left for its reader to add."""
        deferred = self._model.bridge.current.deferred
        if deferred is None or deferred[0] is not x:
            return x
        part, stream = deferred[1:]
        return stream + (part.whole() if isinstance(part, PartialProduct) else part)


class _TracedAttention(AttentionBackend):
    """Keeps what attention calls are given and give."""

    def __init__(self, attention: AttentionBackend, trace: Trace, leader: Trace | None) -> None:
        self._attention = attention
        self._trace = trace
        self._leader = leader

    def prepare(self, batch: ForwardBatch) -> None:
        """As the attention behind."""
        self._attention.prepare(batch)

    def prepare_in_graph(self, batch: ForwardBatch) -> None:
        """As the attention behind."""
        self._attention.prepare_in_graph(batch)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        call: AttentionCallSpec,
        batch: ForwardBatch,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As the attention behind, which dispatches by mode itself."""
        part = (f"{call.module}.attention", call.ordinal)
        self._trace.given[part] = tuple(
            None if x is None else self._trace.keep(x) for x in (q, k, v)
        )
        lead_q, lead_k, lead_v = self._lead(part)
        q = q if lead_q is None else lead_q
        k, v = k if lead_k is None else lead_k, v if lead_v is None else lead_v
        out = self._attention.forward(q, k, v, call, batch, sinks=sinks)
        self._trace.gave[part] = (self._trace.keep(out),)
        return out

    forward_decode = forward_extend

    def _lead(self, part: Part) -> tuple[Tensor | None, ...]:
        nothing = (None, None, None)
        return nothing if self._leader is None else self._leader.given.get(part, nothing)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Floating-point tensors that a module returned, at the top of its output."""
    parts = output.values() if isinstance(output, dict) else output
    for part in (parts,) if isinstance(parts, Tensor) or parts is None else parts:
        if isinstance(part, Tensor) and part.is_floating_point():
            yield part
