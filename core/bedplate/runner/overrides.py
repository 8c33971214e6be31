# SPDX-License-Identifier: Apache-2.0
"""Override packs prove themselves on the model that runs, or give their place back.

A trial of the model, fused as it would be, shows what each override is called with.  On those
very arguments it is compared with the meaning of the operation and timed against what it
replaces.  One that is wrong or slower is withdrawn; either way the decision
``override.OPERATION`` keeps the figures.
"""

from __future__ import annotations

__all__ = ["SLOWER", "prove_decode_loop", "prove_operations"]

import math
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from bedplate.contract.decisions import Candidate, Decision, Verdict
from bedplate.contract.ops import OpProvider, OpRegistry, OpRequest
from bedplate.models.fusion.plan import fuse
from bedplate.reference.ops import OPERATIONS
from bedplate.runner.proof import copied, gap_between, seconds_per_call, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from bedplate.contract.runtime import DeviceRuntime
    from bedplate.models.fusion.plan import FusionMode
    from bedplate.models.fusion.trial import Trial
    from bedplate.registry.bind import BoundBackend
    from bedplate.registry.decisions import DecisionLog
    from bedplate.registry.ops import Operations
    from bedplate.runner.decode_loop import DecodeLoop

SLOWER = 1.1
"""Times as long as what it replaces that an override may take: less is noise."""

LENGTHS = (64, 512)
"""Tokens of the passes that are tried besides those of fusion, one and eight."""

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
Shapes = tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class Use:
    """One override in one place.

    Attributes:
        request: What it was chosen for.
        provider: The override.
        shared: Whether a tensor is a weight, which nobody changes and nothing copies.
        examples: Shapes of its tensors → arguments of its first call with them.
    """

    request: OpRequest
    provider: OpProvider
    shared: Callable[[Tensor], bool]
    examples: dict[Shapes, Arguments] = field(default_factory=dict)


class Witness(OpRegistry):
    """Chooses as the registry does, and keeps what overrides are called with.

    Calls are answered by the reference: what overrides will meet is a model that is right.

    Args:
        ops: Chooses.
        shared: Whether a tensor is a weight.

    Attributes:
        uses: (provider, request) → the override in that place.
    """

    def __init__(self, ops: Operations, shared: Callable[[Tensor], bool]) -> None:
        self._ops = ops
        self._shared = shared
        self._watching = True
        self.uses: dict[tuple[str, str], Use] = {}

    @contextmanager
    def looking_away(self, context: AbstractContextManager[object]) -> Iterator[None]:
        """A context in which calls are not kept, such as a rehearsal: it computes nothing."""
        self._watching = False
        try:
            with context:
                yield
        finally:
            self._watching = True

    def register(self, provider: OpProvider) -> None:
        """See ``OpRegistry.register``."""
        self._ops.register(provider)

    def choose(self, request: OpRequest) -> OpProvider:
        """See ``OpRegistry.choose``; an override comes back watched."""
        provider = self._ops.choose(request)
        if provider.kind != "kernels":
            return provider
        key = (provider.provider, repr(request))
        use = self.uses.setdefault(key, Use(request, provider, self._shared))
        return replace(provider, call=partial(self._call, use))

    def _call(self, use: Use, *args: Any, **kwargs: Any) -> Any:
        shapes = tuple(tuple(x.shape) for x in tensors_of((args, kwargs)))
        if self._watching and shapes not in use.examples:
            use.examples[shapes] = copied((args, kwargs), use.shared)
        return OPERATIONS[use.request.op](*args, **kwargs)


def prove_operations(
    bound: BoundBackend,
    decisions: DecisionLog,
    module: nn.Module,
    trial: Trial,
    *,
    mode: FusionMode,
    most_tokens: int,
    timed: bool = True,
) -> None:
    """Withdraw every override that is wrong or slower on this model; records each verdict.

    The model is left as it was found.

    Args:
        bound: Whose operations are overridden.
        decisions: Receives ``override.*``.
        module: The model, with its weights, before it is fused.
        trial: Runs it.
        mode: How it will be fused.
        most_tokens: Most tokens that one pass will have.
        timed: Whether a slower one is withdrawn; bits must not hang on a clock where they are
            promised.
    """
    if not bound.ops.has_overrides or mode == "compile":  # where no operation is used
        return

    def watch() -> dict[tuple[str, str], Use]:
        return _watch(bound, module, trial, mode, most_tokens)

    _prove_all(watch, bound, decisions, timed=timed)


def prove_decode_loop(
    bound: BoundBackend,
    decisions: DecisionLog,
    make: Callable[[OpRegistry], DecodeLoop],
    *,
    vocab_size: int,
    timed: bool = True,
) -> None:
    """The same for the operations around a recorded pass.

    Args:
        bound: Whose operations are overridden.
        decisions: Receives ``override.*``.
        make: Makes a loop that nobody else uses, with the given operations.
        vocab_size: Logits a row.
        timed: As in ``prove_operations``.
    """

    def watch() -> dict[tuple[str, str], Use]:
        witness = Witness(bound.ops, lambda _tensor: False)
        make(witness).try_out(vocab_size)
        return witness.uses

    if bound.ops.has_overrides:
        _prove_all(watch, bound, decisions, timed=timed)


def _prove_all(
    watch: Callable[[], dict[tuple[str, str], Use]],
    bound: BoundBackend,
    decisions: DecisionLog,
    *,
    timed: bool,
) -> None:
    proven: set[tuple[str, str]] = set()
    withdrawn = True
    while withdrawn:  # what takes the place of an override may be another one
        uses = watch()
        fresh = [use for key, use in uses.items() if key not in proven]
        proven |= set(uses)
        kept = [_settle(use, bound, decisions, timed=timed) for use in fresh]
        withdrawn = not all(kept)


def _watch(
    bound: BoundBackend, module: nn.Module, trial: Trial, mode: FusionMode, most_tokens: int
) -> dict[tuple[str, str], Use]:
    """Fuse, run passes of several lengths, and take all back; what overrides were used for."""
    witness = Witness(bound.ops, _is_weight_of(module))

    def rehearsal() -> AbstractContextManager[object] | None:
        context = bound.runtime.rehearsal()
        return None if context is None else witness.looking_away(context)

    plan = fuse(module, witness, mode=mode, trial=trial, rehearsal=rehearsal)
    for length in LENGTHS if plan.sites else ():
        trial.run(module, tokens=min(length, most_tokens))
    plan.revert()
    for use in witness.uses.values():
        if use.request.op == "qk_norm_rope_write":
            _add_cache(use)
    return witness.uses


def _add_cache(use: Use) -> None:
    """Examples with a cache to write to; decode passes have one, trial passes do not."""
    for (q, k, v, *rest), _ in list(use.examples.values()):
        keys, values = (x.new_zeros((len(x) + 1, *x.shape[1:])) for x in (k, v))
        slots = torch.arange(len(k), 0, -1, device=k.device)
        args = (q, k, v, *rest[:3], keys, values, slots)
        use.examples[tuple(tuple(x.shape) for x in tensors_of(args))] = args, {}


def _settle(use: Use, bound: BoundBackend, decisions: DecisionLog, *, timed: bool) -> bool:
    """Decide about one use, and withdraw the override if it fails; whether it stays."""
    rival = bound.ops.next_best(use.request, use.provider)
    with decisions.choosing(f"override.{use.request.op}") as decide:
        verdict, reason, figures = _judge(use, rival, bound.runtime, timed=timed)
        kept = verdict == "chosen"
        if not kept:
            bound.ops.withdraw(use.request, use.provider, reason)
        instead = Candidate(
            name=rival.provider,
            verdict="possible" if kept else "chosen",
            reason="what the override replaces",
        )
        decide(
            Decision(
                point=f"override.{use.request.op}",
                chosen=use.provider.provider if kept else rival.provider,
                candidates=(
                    Candidate(name=use.provider.provider, verdict=verdict, reason=reason),
                    instead,
                ),
                detail={"dtype": use.request.dtype, **_printed(use.request), **figures},
            )
        )
    return kept


def _judge(
    use: Use, rival: OpProvider, runtime: DeviceRuntime, *, timed: bool
) -> tuple[Verdict, str, dict[str, str]]:
    """Verdict, reason, and figures by shape."""
    if not use.examples:
        return "chosen", "this model does not call it in its trial passes", {}
    figures: dict[str, str] = {}
    ratios = []
    for shapes, example in use.examples.items():
        name = "x".join(map(str, shapes[0])) if shapes else "no tensor"
        try:
            got = _outcome(use.provider.call, example, use.shared)
            gap = gap_between(got, _outcome(OPERATIONS[use.request.op], example, use.shared))
        except Exception as error:
            return "failed", f"it raised {type(error).__name__}: {error} on {name}", figures
        if not gap.ok:
            return "failed", f"wrong on {name}: {gap} to the reference", figures
        figures[name] = str(gap)
        if not timed:
            continue
        mine, theirs = seconds_per_call(
            runtime,
            [_bound_call(p.call, example, use.shared) for p in (use.provider, rival)],
        )
        ratios.append(theirs / mine)
        figures[name] += f"; {mine * 1e6:.1f} µs, {rival.provider} {theirs * 1e6:.1f} µs"
    if not timed:
        return "chosen", "agrees with the reference", figures
    speed = math.exp(sum(map(math.log, ratios)) / len(ratios))
    against = f"{speed:.2f} times the speed of {rival.provider}"
    if speed * SLOWER < 1:
        return "refused", f"slower: {against}", figures
    return "chosen", f"agrees with the reference; {against}", figures


def _outcome(
    call: Callable[..., Any], example: Arguments, shared: Callable[[Tensor], bool]
) -> tuple[Any, list[Tensor]]:
    """What a call returns, and what it leaves in its arguments."""
    own = copied(example, shared)
    result = call(*own[0], **own[1])
    return result, [x for x in tensors_of(own) if not shared(x)]


def _bound_call(
    call: Callable[..., Any], example: Arguments, shared: Callable[[Tensor], bool]
) -> Callable[[], object]:
    args, kwargs = copied(example, shared)
    return partial(call, *args, **kwargs)


def _is_weight_of(module: nn.Module) -> Callable[[Tensor], bool]:
    def storage(x: Tensor) -> int:
        return x.untyped_storage().data_ptr()

    return lambda x: storage(x) in {storage(p) for p in module.parameters()}


def _printed(request: OpRequest) -> dict[str, str]:
    return {name: str(value) for name, value in request.attributes.items()}
