# SPDX-License-Identifier: Apache-2.0
"""Override packs: kernels for a backend that somebody else wrote.

A pack that targets the selected backend registers after it.  One that fails is left out as a
whole, with a decision that says so: nobody asked for it by name.  What is registered has yet to
prove itself on the model that runs: see ``runner.overrides``.
"""

from __future__ import annotations

__all__ = ["register_packs"]

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from bedplate.contract.decisions import Candidate, Decision, Verdict
from bedplate.contract.ops import OpProvider, OpRegistry, OpRequest
from bedplate.registry.hook_table import cause_of

if TYPE_CHECKING:
    from bedplate.registry.attention import AttentionProviders
    from bedplate.registry.decisions import DecisionLog
    from bedplate.registry.ops import Operations
    from bedplate.registry.records import PluginRecord, Survey


def register_packs(
    survey: Survey,
    backend: str,
    ops: Operations,
    attention: AttentionProviders,
    decisions: DecisionLog,
) -> None:
    """Let every pack register, or say why not; one decision ``pack.<name>`` each."""
    for record in survey.records:
        if record.kind != "kernels":
            continue
        with decisions.choosing(f"pack.{record.name}") as decide:
            verdict, reason = _register(record, survey, backend, ops, attention)
            candidate = Candidate(name=record.name, verdict=verdict, reason=reason)
            decide(
                Decision(
                    point=f"pack.{record.name}",
                    chosen=record.name if verdict == "chosen" else None,
                    candidates=(candidate,),
                )
            )


class _Overrides(OpRegistry):
    """The registry as packs see it: what they offer is marked as theirs."""

    def __init__(self, ops: Operations) -> None:
        self._ops = ops

    def register(self, provider: OpProvider) -> None:
        self._ops.register(replace(provider, kind="kernels"))

    def choose(self, request: OpRequest) -> OpProvider:
        return self._ops.choose(request)


def _register(
    record: PluginRecord, survey: Survey, backend: str, ops: Operations,
    attention: AttentionProviders,
) -> tuple[Verdict, str]:  # fmt: skip
    if not record.usable:
        return "failed" if record.status == "failed" else "refused", record.reason
    assert record.manifest is not None
    assert survey.hooks is not None
    targets = record.manifest.targets
    if targets and backend not in targets:
        return "refused", f"it targets {', '.join(targets)}"
    try:
        with ops.all_or_nothing(), attention.all_or_nothing():
            survey.hooks.call(record.key, "bedplate_register_ops", registry=_Overrides(ops))
            survey.hooks.call(
                record.key,
                "bedplate_register_attention",
                register=partial(attention.register, override=True),
            )
    except (Exception, SystemExit) as error:
        return "failed", f"it raised {cause_of(error)}"
    return "chosen", f"it targets {', '.join(targets) or 'every backend'}"
