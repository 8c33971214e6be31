# SPDX-License-Identifier: Apache-2.0
"""Stage 4: which backend runs. Pure: records in, a decision and an answer or error out.

Nothing is ever chosen in silence: a name that was asked for and cannot run is an error unless
the next name of the same request allows the step, and ``auto`` refuses to settle for a slower
class than the one that seems to be present.
"""

from __future__ import annotations

__all__ = ["BackendRequest", "Selection", "Wanted", "parse_request", "select_backend"]

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bedplate.contract.decisions import Candidate, Decision, Verdict
from bedplate.errors import BackendError, ConfigError
from bedplate.registry.faults import FAULTS, fault
from bedplate.registry.records import PluginRecord, Survey, join_reasons, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

AUTO = "auto"
_WANTED = re.compile(r"([a-z][a-z0-9_]*)(?::(\d{1,4}))?")
_ONLY_BY_NAME = "runs only if it is named"
_BROKE = frozenset({"HW021", "HW040", "HW041", "HW044"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One name of a request; ``index`` only where one was given."""

    name: str
    index: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRequest:
    """What was asked for, and where.

    Attributes:
        text: ``auto``, ``name``, ``name:index`` or ``a,b``.
        source: ``argument``, ``--backend``, ``BEDPLATE_BACKEND``, a file, or ``default``.
    """

    text: str = AUTO
    source: str = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Outcome of the stage: a record or an error, and the decision in both cases."""

    decision: Decision
    record: PluginRecord | None = None
    device_index: int = 0
    error: BackendError | None = None


def parse_request(request: BackendRequest) -> tuple[Wanted, ...]:
    """Names in order of preference; empty for ``auto``.

    Raises:
        ConfigError: The text is none of the allowed forms.
    """
    text = request.text.strip()
    if text == AUTO:
        return ()
    wanted = []
    for part in text.split(","):
        match = _WANTED.fullmatch(part.strip())
        if match is None or match[1] in (AUTO, "none", "all"):
            raise ConfigError(
                f"Backend {request.text!r} (from {request.source}) cannot be read at "
                f"{part.strip()!r}; allowed: auto (alone), NAME, NAME:INDEX, or a "
                "comma-separated order of preference. To see names: `bedplate backends`.",
                value=request.text,
                source=request.source,
            )
        wanted.append(Wanted(name=match[1], index=int(match[2]) if match[2] else None))
    return tuple(wanted)


def select_backend(request: BackendRequest, survey: Survey) -> Selection:
    """Choose among probed backends.

    Args:
        request: What was asked for.
        survey: After probing, at least of the names in the request.

    Raises:
        ConfigError: The request cannot be read.
    """
    wanted = parse_request(request)
    return _by_name(request, wanted, survey) if wanted else _by_score(request, survey)


def _by_name(request: BackendRequest, wanted: Sequence[Wanted], survey: Survey) -> Selection:
    candidates: list[Candidate] = []
    errors: list[tuple[Wanted, BackendError]] = []
    chosen: PluginRecord | None = None
    index = 0
    for item in wanted:
        record = survey.backend(item.name)
        error = _why_not(item, record, survey, request)
        if error is not None:
            errors.append((item, error))
            candidates.append(_candidate(item.name, _verdict(error), _short(error, record)))
        elif chosen is None:
            assert record is not None
            chosen, index = record, _device_index(item, record)
            candidates.append(_candidate(item.name, "chosen", f"asked for by {request.source}"))
        else:
            candidates.append(_candidate(item.name, "possible", f"'{chosen.name}' comes first"))
    candidates += _not_asked(survey, {item.name for item in wanted}, request)
    error = None if chosen else _none_of(request, errors, candidates)
    return _selection(request, candidates, chosen, index, error)


def _by_score(request: BackendRequest, survey: Survey) -> Selection:
    ranked = sorted(survey.backends(), key=lambda r: (-r.score, r.name))
    usable = [record for record in ranked if record.usable and not _only_by_name(record)]
    error = _refuse_auto(request, usable, survey)
    chosen = usable[0] if usable and error is None else None
    candidates = [
        _candidate(record.name, *_auto_verdict(record, chosen, error)) for record in ranked
    ]
    index = _device_index(Wanted(name=chosen.name), chosen) if chosen else 0
    return _selection(request, candidates, chosen, index, error)


def _selection(
    request: BackendRequest, candidates: Sequence[Candidate], chosen: PluginRecord | None,
    index: int, error: BackendError | None,
) -> Selection:  # fmt: skip
    detail = {"request": request.text, "source": request.source}
    if chosen is not None:
        detail |= {"device": str(index), "score": str(chosen.score)}
    name = chosen.name if chosen else None
    decision = Decision(
        point="backend", chosen=name, candidates=tuple(candidates), detail=detail
    )
    return Selection(decision=decision, record=chosen, device_index=index, error=error)


def _why_not(
    item: Wanted, record: PluginRecord | None, survey: Survey, request: BackendRequest
) -> BackendError | None:
    if record is None:
        return _not_provided(item.name, survey, request)
    if not record.usable:
        return record.error
    seen = [device.index for device in record.probe.devices] if record.probe else []
    if item.index is None or not seen or item.index in seen:
        return None
    return fault(
        "HW007", name=item.name, index=item.index, source=f"from {request.source}",
        devices=", ".join(map(str, seen)),
    )  # fmt: skip


def _not_provided(name: str, survey: Survey, request: BackendRequest) -> BackendError:
    source = f"from {request.source}"
    if name in survey.known:
        usable = ", ".join(r.name for r in survey.backends() if r.usable) or "nothing"
        return fault(
            "HW004", name=name, source=source, version=survey.home_version, usable=usable
        )  # fmt: skip
    provided = {record.name for record in survey.backends()}
    installed = ", ".join(
        f"{record.name} (from {record.distribution} {record.version})"
        for record in survey.backends()
    )
    hint = nearest(name, provided | survey.known)
    return fault("HW001", name=name, source=source, installed=installed or "none", hint=hint)


def _short(error: BackendError, record: PluginRecord | None) -> str:
    """Half a sentence: the record's own when the error is its, else the fault's title."""
    if record is not None and record.error is error:
        return record.reason
    return FAULTS[error.code].title.lower()


def _none_of(
    request: BackendRequest,
    errors: Sequence[tuple[Wanted, BackendError]],
    candidates: Sequence[Candidate],
) -> BackendError:
    if len(errors) == 1:
        return errors[0][1]
    named = zip(candidates, errors, strict=False)
    reasons = join_reasons((c.name, f"{c.reason} ({error.code})") for c, (_, error) in named)
    return fault(
        "HW006", request=request.text, source=f"from {request.source}", reasons=reasons
    )


def _refuse_auto(
    request: BackendRequest, usable: Sequence[PluginRecord], survey: Survey
) -> BackendError | None:
    """Why ``auto`` must not choose, or ``None``."""
    unusable = [record for record in survey.backends() if record not in usable]
    present = [record for record in unusable if _seems_present(record)]
    if not usable:
        reasons = join_reasons((r.name, r.reason or _ONLY_BY_NAME) for r in unusable)
        if present:
            names = ", ".join(f"'{record.name}'" for record in present)
            return fault("HW003", present=f"claimed by {names}", reasons=reasons)
        source = f"from {request.source}"
        return fault("HW006", request=request.text, source=source, reasons=reasons)
    best = usable[0]
    higher = [record for record in present if _class_of(record) > score_class(best.score)]
    if higher:
        text = ", ".join(
            f"'{r.name}' is present but failed ({r.error.code if r.error else ''}: {r.reason})"
            for r in higher
        )
        return fault("HW051", present=text, fallback=best.name)
    equal = [record.name for record in usable if record.score == best.score]
    if len(equal) > 1:
        names = " and ".join(f"'{name}'" for name in equal)
        return fault("HW050", names=names, score=best.score, first=best.name)
    return None


def score_class(score: int) -> int:
    """0 host, 1 integrated, 2 accelerator."""
    return (score >= 100) + (score >= 500)


def _only_by_name(record: PluginRecord) -> bool:
    return record.probe is not None and record.probe.only_by_name


def _seems_present(record: PluginRecord) -> bool:
    return (
        record.probe is not None
        and not record.probe.only_by_name
        and (record.probe.present or record.probe.score > 0)
    )


def _class_of(record: PluginRecord) -> int:
    """Class of a device that failed; a probe that cannot use it gives no score to tell by."""
    score = record.probe.score if record.probe else 0
    return score_class(score or 500)


def _device_index(item: Wanted, record: PluginRecord) -> int:
    if item.index is not None:
        return item.index
    devices = record.probe.devices if record.probe else ()
    return devices[0].index if devices else 0


def _auto_verdict(
    record: PluginRecord, chosen: PluginRecord | None, error: BackendError | None
) -> tuple[Verdict, str]:
    if record.error is not None:
        return _verdict(record.error), record.reason
    if _only_by_name(record):
        return "refused", _ONLY_BY_NAME
    if record is chosen:
        return "chosen", f"highest score, {record.score}"
    why = f"'{chosen.name}' has a higher score" if chosen else error.message if error else ""
    return "possible", f"score {record.score}; {why.rstrip('.')}"


def _not_asked(survey: Survey, named: set[str], request: BackendRequest) -> list[Candidate]:
    return [
        _candidate(record.name, "refused", record.reason or f"not named by {request.source}")
        for record in survey.backends()
        if record.name not in named
    ]


def _verdict(error: BackendError) -> Verdict:
    return "failed" if error.code in _BROKE else "refused"


def _candidate(name: str, verdict: Verdict, reason: str) -> Candidate:
    return Candidate(name=name, verdict=verdict, reason=reason)
