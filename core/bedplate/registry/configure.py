# SPDX-License-Identifier: Apache-2.0
"""Merge what a backend proposes into the settings that nobody gave.

A backend never edits the configuration: it proposes values with reasons, and each proposal
becomes a decision ``config.<setting>``.  What the user gave always stays.
"""

from __future__ import annotations

__all__ = ["apply_proposals"]

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from bedplate.config import EngineConfig, setting_names
from bedplate.contract.decisions import Candidate, Decision
from bedplate.errors import ConfigError
from bedplate.registry.faults import fault
from bedplate.registry.records import PluginRecord, nearest

if TYPE_CHECKING:
    from bedplate.registry.decisions import DecisionLog

_HOOK: Final = "bedplate_configure"
_USERS_ALONE: Final = frozenset({
    "model", "tokenizer", "backend", "backend_options", "seed", "trust_remote_code",
})  # fmt: skip
"""Settings that change what is computed or what may run, not how."""


def apply_proposals(
    config: EngineConfig, proposals: object, record: PluginRecord, decisions: DecisionLog
) -> EngineConfig:
    """The configuration with acceptable proposals taken over.

    Args:
        config: What the user asked for.
        proposals: Answer of the hook, setting → (value, reason); ``None`` proposes nothing.
        record: The backend that proposes.
        decisions: Receives one decision per proposal.

    Raises:
        ContractError: Something in ``proposals`` is no setting, not the backend's to change,
            or has no allowed value (HW044; all of them are listed).
    """
    if proposals is None:
        return config
    problems = _problems(proposals)
    if not problems:
        assert isinstance(proposals, Mapping)
        try:
            return _merge(config, proposals, record.name, decisions)
        except ConfigError as error:
            problems = [error.message]
    raise fault("HW044", **record.facts(), hook=_HOOK, problems="; ".join(problems))


def _merge(
    config: EngineConfig, proposals: Mapping[str, tuple[Any, str]], backend: str,
    decisions: DecisionLog,
) -> EngineConfig:  # fmt: skip
    taken = {name: value for name, (value, _why) in proposals.items() if not config.given(name)}
    sources = {**config.sources, **dict.fromkeys(taken, f"backend {backend}")}
    merged = replace(config, **taken, sources=sources)
    for name, (value, why) in proposals.items():
        with decisions.choosing(f"config.{name}") as decide:
            decide(_decision(config, name, value, why, backend))
    return merged


def _decision(config: EngineConfig, name: str, value: Any, why: str, backend: str) -> Decision:
    own = getattr(config, name)
    given = config.given(name)
    origin = f"given by {config.source(name)}" if given else "the default"
    proposal = Candidate(
        name=str(value), verdict="refused" if given else "chosen",
        reason=f"backend '{backend}': {why.rstrip('.')}",
    )  # fmt: skip
    present = Candidate(name=str(own), verdict="chosen" if given else "possible", reason=origin)
    return Decision(
        point=f"config.{name}",
        chosen=str(own if given else value),
        candidates=(present, proposal) if given else (proposal, present),
    )


def _problems(proposals: object) -> list[str]:
    if not isinstance(proposals, Mapping):
        return [f"it gave {type(proposals).__name__}, not a mapping"]
    problems = []
    for name, proposal in proposals.items():
        if name not in setting_names():
            problems.append(f"{name!r} is no setting.{nearest(str(name), setting_names())}")
        elif name in _USERS_ALONE:
            problems.append(f"{name!r} belongs to the user alone")
        elif not (isinstance(proposal, tuple) and len(proposal) == 2):
            problems.append(f"{name!r} is not proposed as (value, reason)")
        elif not (isinstance(proposal[1], str) and proposal[1]):
            problems.append(f"{name!r} is proposed without a reason")
    return problems
