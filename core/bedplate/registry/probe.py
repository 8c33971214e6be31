# SPDX-License-Identifier: Apache-2.0
"""Stage 3: ask loaded backends whether they could run here, with a guard and a time limit.

A probe that raises, hangs, lies about its type or creates a device context becomes a record
with an error or a warning; the next backend is asked regardless.
"""

from __future__ import annotations

__all__ = ["PROBE_LIMIT_S", "probe_backends"]

import queue
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from bedplate.contract.manifest import ProbeRequest, ProbeResult
from bedplate.registry.faults import fault
from bedplate.registry.hook_table import HookTable, cause_of, hook_failure

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from bedplate.registry.records import PluginRecord, Survey

PROBE_LIMIT_S: Final = 2.0
MAX_SCORE: Final = 999
_HOOK: Final = "bedplate_probe"
_UNUSABLE_CODES: Final = ("HW010", "HW011", "HW012")


def probe_backends(
    survey: Survey,
    environment: Mapping[str, str],
    *,
    names: Collection[str] | None = None,
    limit_s: float = PROBE_LIMIT_S,
) -> Survey:
    """Probe loaded backends that were not probed yet.

    Args:
        survey: After inspection.
        environment: What probes may read.
        names: Only these; all when not given.
        limit_s: Seconds that one probe may take.
    """
    assert survey.hooks is not None
    request = ProbeRequest(environment=environment)
    records = []
    for record in survey.records:
        wanted = names is None or record.name in names
        waiting = record.kind == "backend" and record.status == "loaded" and not record.probe
        if wanted and waiting:
            record = _probe(record, survey.hooks, request, limit_s)
        records.append(record)
    return replace(survey, records=tuple(records))


def _probe(
    record: PluginRecord, hooks: HookTable, request: ProbeRequest, limit_s: float
) -> PluginRecord:
    context_before = _device_context_exists()
    try:
        answer = _within(limit_s, lambda: hooks.call(record.key, _HOOK, request=request))
    except (Exception, SystemExit) as error:
        return _failed(record, error)
    if _device_context_exists() and not context_before:
        warning = fault("HW043", **record.facts())
        record = replace(record, warnings=(*record.warnings, warning))
    problems = _problems(answer)
    if problems:
        text = "; ".join(problems)
        broken = fault("HW044", **record.facts(), hook=_HOOK, problems=text)
        return _keep_first_cause(record.without("failed", broken, text), record)
    record = replace(record, probe=answer)
    return _unusable(record, answer) if answer.score == 0 else record


def _within(limit_s: float, ask: Any) -> Any:
    """Run ``ask`` in a thread; a hung one is left behind, because it cannot be ended."""
    answers: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=1)

    def work() -> None:
        try:
            answers.put((True, ask()))
        except BaseException as error:
            answers.put((False, error))

    threading.Thread(target=work, name="bedplate-probe", daemon=True).start()
    try:
        fine, answer = answers.get(timeout=limit_s)
    except queue.Empty:
        raise TimeoutError(f"no answer within {limit_s:g} s") from None
    if not fine:
        raise answer
    return answer


def _failed(record: PluginRecord, error: BaseException) -> PluginRecord:
    failure = hook_failure(record, _HOOK, None, error)
    reason = f"probe failed: {cause_of(error)}"
    return _keep_first_cause(record.without("failed", failure, reason), record)


def _keep_first_cause(found: PluginRecord, before: PluginRecord) -> PluginRecord:
    """A missing requirement explains whatever went wrong after it."""
    return found if before.error is None else before


def _problems(answer: object) -> list[str]:
    if not isinstance(answer, ProbeResult):
        return [f"gave {type(answer).__name__}, not ProbeResult"]
    problems = []
    if not 0 <= answer.score <= MAX_SCORE:
        problems.append(f"score {answer.score} is not from 0 to {MAX_SCORE}")
    if answer.score == 0 and not answer.reasons:
        problems.append("score 0 without a reason")
    if answer.score == 0 and answer.code not in _UNUSABLE_CODES:
        problems.append(f"code {answer.code!r} is none of {', '.join(_UNUSABLE_CODES)}")
    return problems


def _unusable(record: PluginRecord, answer: ProbeResult) -> PluginRecord:
    if record.error is not None:
        return record
    reasons = "; ".join(reason.rstrip(".") for reason in answer.reasons)
    remedy = record.manifest.remedy if record.manifest else ""
    error = fault(
        answer.code, **record.facts(), reasons=reasons,
        found=_facts(answer), remedy=remedy or "Mend the cause.",
    )  # fmt: skip
    return replace(record, error=error, reason=reasons)


def _facts(answer: ProbeResult) -> str:
    return ", ".join(f"{name} {value}" for name, value in answer.facts.items()) or "none"


def _device_context_exists() -> bool:
    """Whether this process holds a device; asks torch only if somebody imported it."""
    torch = sys.modules.get("torch")
    try:
        device = torch.accelerator.current_accelerator()  # type: ignore[union-attr]
        return bool(torch.get_device_module(device.type).is_initialized())  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):
        return False  # no torch, an unfinished import of it, or no accelerator in its build
