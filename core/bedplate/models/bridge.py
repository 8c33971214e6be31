# SPDX-License-Identifier: Apache-2.0
"""The attention function that transformers calls, and the step it works for.

One function is registered in the process, under our name; each attention module knows its
bridge by an attribute, so several models can live side by side.  The runner-owned
``StepContext`` is put into the bridge once per forward; there is no look-up by name and no
keyword that a layer could drop.

Calls come in the order that the probe saw.  A call that comes from another module, one call
too many or too few, or a mask, is an error: never a wrong answer.

Shapes: T tokens, H query heads, K key/value heads, D head size, Dv value size.
"""

from __future__ import annotations

__all__ = ["AttentionBridge", "StepContext", "attention"]

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bedplate.errors import ContractError, InternalError
from bedplate.models import latent
from bedplate.models.transformers_api import register_attention

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.contract.attention import AttentionBackend, AttentionCallSpec
    from bedplate.contract.memory import KVPool
    from bedplate.reference.ops import PartialProduct

_ATTRIBUTE = "_bedplate_bridge"


@dataclass(slots=True)
class StepContext:
    """What the attention calls of one forward need. Made anew for each.

    Attributes:
        batch: The prepared batch.
        attention: The backend that attends.
        kv_pool: Where a fused form may write keys and values itself; ``None`` = nowhere.
        cursor: Attention calls made so far.
        deferred: What a layer returned, and two that are still to be added: a part, perhaps a
            product in parts, and the stream. Who reads the layer recognises what it returned
            by identity, and adds while it norms.
        wanted: ``[R]`` int64 device; the only tokens whose output anybody reads. The last
            layer leaves the others out and takes this away; ``None`` = all.
    """

    batch: ForwardBatch
    attention: AttentionBackend
    kv_pool: KVPool | None = None
    cursor: int = 0
    deferred: tuple[Tensor, Tensor | PartialProduct, Tensor] | None = None
    wanted: Tensor | None = None

    def take_wanted(self) -> Tensor | None:
        """The tokens to go on with, once."""
        wanted, self.wanted = self.wanted, None
        return wanted

    def take_deferred(self, x: Tensor) -> tuple[Tensor | PartialProduct, Tensor | None]:
        """The part and the stream that ``x`` stands for, once; else ``x`` and ``None``."""
        deferred = self.deferred
        if deferred is None or deferred[0] is not x:
            return x, None
        self.deferred = None
        return deferred[1:]


class AttentionBridge:
    """Hands each attention call of one model to the backend, with its description.

    Args:
        model: The module tree; its attention modules get a reference to the bridge.
        calls: The calls of one forward, in order.
        check: Compare scale, window and soft-cap of every call with its description.

    Attributes:
        trims: Whether the last layer leaves out tokens that nobody wants.
    """

    def __init__(
        self, model: nn.Module, calls: Sequence[AttentionCallSpec], *, check: bool = False
    ) -> None:
        self._calls = tuple((model.get_submodule(call.module), call) for call in calls)
        self._check = check
        self._step: StepContext | None = None
        self.trims = False
        for module, _ in self._calls:
            module.__dict__[_ATTRIBUTE] = self

    @contextmanager
    def step(self, context: StepContext) -> Iterator[None]:
        """Serve one forward of the model.

        Raises:
            ContractError: The forward made fewer attention calls than the probe saw.
        """
        self._step = context
        try:
            yield
        finally:
            self._step = None
        if context.deferred is not None:
            raise InternalError(
                "a fused layer left its residual to nobody; please report the model, and run "
                "it with --fusion leaf until then"
            )
        if context.wanted is not None:
            raise InternalError(
                "no layer left out the tokens that nobody wants; please report the model, and "
                "run it with --fusion leaf until then"
            )
        if context.cursor != len(self._calls):
            raise ContractError(
                f"the model made {context.cursor} attention calls where the probe saw "
                f"{len(self._calls)}; its path depends on the input. Please report the model"
            )

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None,
        arguments: dict[str, Any],
    ) -> Tensor:
        """Serve one call as transformers makes it.

        Args:
            module: The caller.
            query: ``[1, H, T, D]``; only its strides differ between families.
            key: ``[1, K, T, D]``; the latent ``[1, 1, T, L]`` where it is kept.
            value: ``[1, K, T, Dv]``; the rotated part of the key where the latent is kept.
            attention_mask: Must be ``None``.
            scaling: Compared with the description in check mode.
            arguments: The other keywords.

        Returns:
            ``[1, T, H, Dv]``.
        """
        step, call = self.next_call(module)
        if attention_mask is not None:
            raise ContractError(
                f"{call.module} received a mask, but masks are the attention backend's work"
            )
        if self._check:
            _compare(call, scaling, arguments)
        sinks = arguments.get("s_aux") if call.sinks else None
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if call.value_in_key:
            return _attend_latent(module, q, k, v, call, step)
        if call.alias_of is not None:
            return _unpack(step.attention.forward(q, None, None, call, step.batch, sinks=sinks))
        return _unpack(step.attention.forward(q, k, v, call, step.batch, sinks=sinks))

    @property
    def current(self) -> StepContext:
        """The step under way.

        Raises:
            ContractError: There is none.
        """
        if self._step is None:
            raise ContractError("a part of the model ran outside a step of its model")
        return self._step

    def next_call(self, module: nn.Module) -> tuple[StepContext, AttentionCallSpec]:
        """Count one attention call of ``module``; the step, and the call's description.

        Raises:
            ContractError: The probe saw another call here.
        """
        step = self.current
        if step.cursor >= len(self._calls):
            raise ContractError(
                f"the model made more than the {len(self._calls)} attention calls that the "
                "probe saw; its path depends on the input. Please report the model"
            )
        expected, call = self._calls[step.cursor]
        if expected is not module:
            raise ContractError(
                f"attention call {step.cursor} came from another module than {call.module}, "
                "which the probe saw; its path depends on the input. Please report the model"
            )
        step.cursor += 1
        return step, call


def _unpack(out: Tensor) -> Tensor:
    return out.unsqueeze(0)


def _attend_latent(
    module: nn.Module,
    query: Tensor,
    latents: Tensor,
    rope_key: Tensor,
    call: AttentionCallSpec,
    step: StepContext,
) -> Tensor:
    rope = rope_key.shape[-1]
    keys = latent.latent_keys(latents, rope_key)
    absorbed = latent.absorb(module, query, rope)
    out = step.attention.forward(absorbed, keys, None, call, step.batch)
    return _unpack(latent.expand(module, out, query.shape[-1] - rope))


def _compare(call: AttentionCallSpec, scaling: float | None, arguments: dict[str, Any]) -> None:
    seen = {
        "scale": scaling,
        "window": arguments.get("sliding_window"),
        "softcap": arguments.get("softcap"),
    }
    wrong = [
        f"{name} is {value}, the probe saw {getattr(call, name)}"
        for name, value in seen.items()
        if value is not None and value != getattr(call, name)
    ]
    if wrong:
        raise ContractError(f"{call.module} changed: " + "; ".join(wrong))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """What transformers finds under our name.

    Never part of what torch's compiler takes: the step under way is another one in every pass.
    """
    bridge: AttentionBridge | None = module.__dict__.get(_ATTRIBUTE)
    if bridge is None:
        raise ContractError(
            f"{type(module).__name__} made an attention call that the probe did not see; "
            "its path depends on the input. Please report the model"
        )
    return bridge.attend(module, query, key, value, attention_mask, scaling, arguments), None


register_attention(attention)
