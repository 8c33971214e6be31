# SPDX-License-Identifier: Apache-2.0
"""Find, verify, apply, and be able to take it all back.

The one place that decides about fusion.  A site that fails its numbers stays as it was; that
is not an error, but a decision with the numbers in it, which ``bedplate explain`` prints.
"""

from __future__ import annotations

__all__ = ["FusionMode", "FusionPlan", "fuse"]

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from bedplate.contract import Candidate, Decision, OpRegistry, Support
from bedplate.errors import BackendError, ConfigError
from bedplate.models.fusion.attention_block import find_attention_blocks
from bedplate.models.fusion.calls import observe, trial_forward
from bedplate.models.fusion.compiled import CompiledModel
from bedplate.models.fusion.glu import find_glus
from bedplate.models.fusion.linear import find_linears
from bedplate.models.fusion.norm import find_norms
from bedplate.models.fusion.residual import find_final_norm, find_layers
from bedplate.models.fusion.rope import find_rotaries
from bedplate.models.fusion.siblings import find_siblings
from bedplate.models.fusion.site import Site, difference

if TYPE_CHECKING:
    from bedplate.models.fusion.calls import Call
    from bedplate.models.fusion.site import Providers
    from bedplate.models.fusion.trial import Trial

logger = logging.getLogger(__name__)

FusionMode = Literal["off", "leaf", "block", "compile"]
Verdict = Literal["chosen", "possible", "refused", "failed"]
Run = Callable[[nn.Module], Tensor]
Rehearsal = Callable[[], AbstractContextManager[object] | None]
Allow = Callable[[str], Support]

# For logits of the whole model. Narrow types round once more in every layer, so there the
# check can only catch a broken form; the sites themselves were verified to the last bits.
MODEL_LIMITS = {
    torch.float64: 1e-8,
    torch.float32: 1e-5,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionPlan:
    """What was decided, and the way back.

    Attributes:
        decisions: One for ``fusion`` itself, then one for each site found.
        sites: Those in use.
    """

    decisions: tuple[Decision, ...]
    sites: tuple[Site, ...]

    def counts(self) -> dict[str, int]:
        """Pattern → sites in use."""
        return dict(Counter(site.pattern for site in self.sites))

    def apply(self) -> None:
        """Take the sites into use again after ``revert``."""
        for site in self.sites:
            site.apply()

    def revert(self) -> None:
        """Give every module its own ``forward`` back; what was put on top goes first."""
        for site in reversed(self.sites):
            site.revert()


def fuse(
    module: nn.Module,
    ops: OpRegistry,
    *,
    mode: FusionMode = "block",
    run: Run = trial_forward,
    trial: Trial | None = None,
    rehearsal: Rehearsal = lambda: None,
    allow: Allow = lambda _site: Support.yes(),
) -> FusionPlan:
    """Fuse what pays and is proven right; call after loading and before graph capture.

    Peak memory is the model and the largest group of sibling weights.

    Args:
        module: A model in evaluation mode, with its weights. Its parameters stay the same
            objects; sibling weights move, once, into merged storage.
        ops: Whose providers do the work.
        mode: ``off`` leaves the model alone; ``leaf`` merges sibling linears and swaps norms;
            ``block`` also replaces attention blocks, gated blocks and whole layers;
            ``compile`` does none of this and gives the model to torch's compiler.
        run: One tiny forward that returns logits; called a few times.
        trial: Runs the model as it will run; blocks with attention are found only in it.
            Takes the place of ``run``.
        rehearsal: Makes the context of ``DeviceRuntime.rehearsal``, or ``None``.
        allow: Asked before a proven site is used, by its point and providers.

    Raises:
        ConfigError: Unknown mode.
    """
    if mode not in get_args(FusionMode):
        modes = ", ".join(get_args(FusionMode))
        raise ConfigError(f"fusion is {mode!r}; it must be one of {modes}.")
    if mode == "off":
        return FusionPlan(decisions=(_whole("off", "asked for", "possible"),), sites=())
    try:
        runs: list[Run] = [run]
        if trial is not None:
            runs = [trial.run, partial(trial.run, tokens=1), partial(trial.run, rows=(5, 2))]
        # The longest run last seen is the one that the trial remembers.
        references = [run(module) for run in runs[1:]]
        reference, calls = observe(module, runs[0])
        references.insert(0, reference)
    except Exception as error:
        reason = f"the trial forward raised {type(error).__name__}: {error}"
        return FusionPlan(decisions=(_whole("off", reason, "failed"),), sites=())
    sites: list[Site]
    if mode == "compile":
        how, sites = "the model is compared as a whole", [CompiledModel(module)]
    else:
        how, sites = "sites are verified one by one", _find(calls, mode, trial)
        _rehearse(rehearsal(), sites, ops, lambda: [run(module) for run in runs])
    decisions = [_whole(mode, how, "chosen")]
    check = partial(_check_model, module, runs, references)
    made, used, broken = _use(sites, ops, check, allow)
    if broken:  # by some kind, which kind by kind will show
        parts = [_use(kind, ops, check, allow) for kind in _kinds(sites)]
        made = [decision for part, _, _ in parts for decision in part]
        used = [site for _, part, _ in parts for site in part]
    decisions += made
    plan = FusionPlan(decisions=tuple(decisions), sites=tuple(used))
    logger.info("fusion: %s", plan.counts() or "nothing pays here")
    return plan


def _find(calls: Sequence[Call], mode: FusionMode, trial: Trial | None) -> list[Site]:
    """All sites, what others build upon first."""
    norms, siblings = find_norms(calls), find_siblings(calls)
    sites: list[Site] = [*siblings, *norms, *find_linears(calls, siblings)]
    if mode == "leaf":
        return sites
    blocks = find_glus(calls)
    if trial is None:
        return [*sites, *blocks]
    attentions = find_attention_blocks(calls, norms, trial)
    bridge = trial.model.bridge
    layers = find_layers(calls, norms, attentions, blocks, bridge)
    final = find_final_norm(calls, norms, layers, bridge)
    rotaries = find_rotaries(calls, attentions)
    return [*sites, *blocks, *attentions, *rotaries, *final, *layers]


def _rehearse(
    rehearsal: AbstractContextManager[object] | None,
    sites: Sequence[Site],
    ops: OpRegistry,
    run: Callable[[], object],
) -> None:
    """Go through verification and the trial with some sites in use, for the kernels alone.

    Layers repeat each other: of the sites whose paths differ in numbers alone the first and
    the last will do.
    """
    if rehearsal is None:
        return
    some = _samples(sites)
    with rehearsal, suppress(Exception):
        for site in some:
            with suppress(Exception):  # whatever it is, verification meets it again
                site.verify({request.op: ops.choose(request) for request in site.requests()})
            site.apply()
        run()
    for site in reversed(some):
        site.revert()


def _samples(sites: Sequence[Site]) -> list[Site]:
    """The first and the last of those that are alike but for numbers in their paths."""
    alike: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        alike.setdefault((site.pattern, re.sub(r"\d+", "", site.path)), []).append(site)
    ends = {id(site) for same in alike.values() for site in (same[0], same[-1])}
    return [site for site in sites if id(site) in ends]


def _kinds(sites: Sequence[Site]) -> list[list[Site]]:
    kinds: dict[str, list[Site]] = {}
    for site in sites:
        kinds.setdefault(site.kind, []).append(site)
    return list(kinds.values())


def _use(
    sites: Sequence[Site], ops: OpRegistry, check: Callable[[], str], allow: Allow
) -> tuple[list[Decision], list[Site], str]:
    """Try sites, and take all back if the whole model is no longer right.

    Returns:
        A decision for each, those in use, and what ``check`` found wrong.
    """
    results = [_try(site, ops, allow) for site in sites]
    used = [site for site, (_, ok) in zip(sites, results, strict=True) if ok]
    broken = check() if used else ""
    if not broken:
        return [decision for decision, _ in results], used, ""
    for site in reversed(used):
        site.revert()
    decisions = [
        _decision(site, "failed", broken) if ok else decision
        for site, (decision, ok) in zip(sites, results, strict=True)
    ]
    return decisions, [], broken


def _try(site: Site, ops: OpRegistry, allow: Allow) -> tuple[Decision, bool]:
    """Verify and apply one site."""
    try:
        providers = {request.op: ops.choose(request) for request in site.requests()}
        pays = site.pays(providers)
        if not pays:
            return _decision(site, "refused", pays.reason), False
        evidence = site.verify(providers)
    except BackendError as error:
        return _decision(site, "refused", error.message), False
    except Exception as error:
        why = f"verification raised {type(error).__name__}: {error}"
        return _decision(site, "failed", why), False
    if not evidence.ok:
        return _decision(site, "failed", evidence.text), False
    allowed = allow(_label(site, providers))
    if not allowed:
        return _decision(site, "refused", allowed.reason), False
    site.apply()
    return _decision(site, "chosen", f"{pays.reason}; {evidence.text}"), True


def _label(site: Site, providers: Providers) -> str:
    """A site and who works in it."""
    parts = [f"{op} by {p.provider}" for op, p in providers.items() if p.kind != "reference"]
    return f"fusion.{site.path}.{site.pattern}: {', '.join(parts) or 'plain torch'}"


def _check_model(module: nn.Module, runs: Sequence[Run], references: Sequence[Tensor]) -> str:
    """Why the whole model is no longer right; empty if it is."""
    try:
        with torch.no_grad():
            gaps = [difference(run(module), r) for run, r in zip(runs, references, strict=True)]
    except Exception as error:
        return f"the model raised {type(error).__name__}: {error}"
    worst, limit = max(gaps), MODEL_LIMITS.get(references[0].dtype, 0.0)
    return "" if worst <= limit else f"logits differ by {worst:.1e}, limit {limit:.1e}"


def _decision(site: Site, verdict: Verdict, why: str) -> Decision:
    chosen = verdict == "chosen"
    own = Candidate(
        name="original",
        verdict="possible" if chosen else "chosen",
        reason="the module's own forward",
    )
    return Decision(
        point=f"fusion.{site.path}.{site.pattern}",
        chosen="fused" if chosen else "original",
        candidates=(Candidate(name="fused", verdict=verdict, reason=why), own),
    )


def _whole(chosen: FusionMode, reason: str, verdict: Verdict) -> Decision:
    """The decision about all of fusion; with ``off``, against what would have been tried."""
    own = Candidate(
        name="off",
        verdict="chosen" if chosen == "off" else "possible",
        reason="every module runs as transformers wrote it",
    )
    name = "block" if chosen == "off" else chosen
    candidates = (Candidate(name=name, verdict=verdict, reason=reason), own)
    return Decision(point="fusion", chosen=chosen, candidates=candidates)
