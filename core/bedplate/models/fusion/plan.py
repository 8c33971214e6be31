# SPDX-License-Identifier: Apache-2.0
"""Find, verify, apply, and be able to take it all back.

The one place that decides about fusion.  A site that fails its numbers stays as it was; that
is not an error, but a decision with the numbers in it, which ``bedplate explain`` prints.
"""

from __future__ import annotations

__all__ = ["FusionMode", "FusionPlan", "fuse"]

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bedplate.contract import Candidate, Decision, OpRegistry
from bedplate.errors import BackendError, ConfigError
from bedplate.models.fusion.calls import observe, trial_forward
from bedplate.models.fusion.norm import find_norms
from bedplate.models.fusion.siblings import find_siblings
from bedplate.models.fusion.site import Site, difference

logger = logging.getLogger(__name__)

FusionMode = Literal["off", "leaf"]
Verdict = Literal["chosen", "possible", "refused", "failed"]
Run = Callable[[nn.Module], Tensor]

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
        """Give every module its own ``forward`` back."""
        for site in self.sites:
            site.revert()


def fuse(
    module: nn.Module,
    ops: OpRegistry,
    *,
    mode: FusionMode = "leaf",
    run: Run = trial_forward,
) -> FusionPlan:
    """Fuse what pays and is proven right; call after loading and before graph capture.

    Peak memory is the model and the largest group of sibling weights.

    Args:
        module: A model in evaluation mode, with its weights. Its parameters stay the same
            objects; sibling weights move, once, into merged storage.
        ops: Whose providers do the work.
        mode: ``off`` leaves the model alone.
        run: One tiny forward that returns logits; called a few times.

    Raises:
        ConfigError: Unknown mode.
    """
    if mode not in get_args(FusionMode):
        modes = ", ".join(get_args(FusionMode))
        raise ConfigError(f"fusion is {mode!r}; it must be one of {modes}.")
    if mode == "off":
        return FusionPlan(decisions=(_whole("off", "asked for", "possible"),), sites=())
    try:
        reference, calls = observe(module, run)
    except Exception as error:
        reason = f"the trial forward raised {type(error).__name__}: {error}"
        return FusionPlan(decisions=(_whole("off", reason, "failed"),), sites=())
    decisions = [_whole("leaf", "sites are verified one by one", "chosen")]
    used: list[Site] = []
    for kind in _kinds([*find_siblings(calls), *find_norms(calls)]):
        results = [_try(site, ops) for site in kind]
        applied = [site for site, (_, ok) in zip(kind, results, strict=True) if ok]
        broken = _check_model(module, run, reference) if applied else ""
        if broken:
            for site in applied:
                site.revert()
        for site, (decision, ok) in zip(kind, results, strict=True):
            decisions.append(_decision(site, "failed", broken) if ok and broken else decision)
        used += [] if broken else applied
    plan = FusionPlan(decisions=tuple(decisions), sites=tuple(used))
    logger.info("fusion: %s", plan.counts() or "nothing pays here")
    return plan


def _kinds(sites: Sequence[Site]) -> list[list[Site]]:
    kinds: dict[str, list[Site]] = {}
    for site in sites:
        kinds.setdefault(site.kind, []).append(site)
    return list(kinds.values())


def _try(site: Site, ops: OpRegistry) -> tuple[Decision, bool]:
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
    site.apply()
    return _decision(site, "chosen", f"{pays.reason}; {evidence.text}"), True


def _check_model(module: nn.Module, run: Run, reference: Tensor) -> str:
    """Why the whole model is no longer right; empty if it is."""
    try:
        with torch.no_grad():
            worst = difference(run(module), reference)
    except Exception as error:
        return f"the model raised {type(error).__name__}: {error}"
    limit = MODEL_LIMITS.get(reference.dtype, 0.0)
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


def _whole(chosen: FusionMode, reason: str, leaf: Verdict) -> Decision:
    own = Candidate(
        name="off",
        verdict="chosen" if chosen == "off" else "possible",
        reason="every module runs as transformers wrote it",
    )
    candidates = (Candidate(name="leaf", verdict=leaf, reason=reason), own)
    return Decision(point="fusion", chosen=chosen, candidates=candidates)
