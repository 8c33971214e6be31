# SPDX-License-Identifier: Apache-2.0
"""L0: what a plugin is before it does anything, and what it leaves behind."""

from __future__ import annotations

__all__ = ["checks"]

import time
from typing import TYPE_CHECKING

import torch

from bedplate.conformance import fresh
from bedplate.conformance.check import Check, Wrong, require
from bedplate.contract.manifest import ProbeRequest, ReportItem
from bedplate.contract.version import API_VERSION
from bedplate.errors import BackendError, ConfigError
from bedplate.registry.enumerate import HOME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bedplate.conformance.subject import Subject

_IMPORT_CPU_S = 0.2
"""Processor seconds that importing ``plugin.py`` may take; twice what the design allows, for
machines that are busy."""
_PROBE_S = 0.5


def checks(subject: Subject) -> Iterator[Check]:
    """One check per rule."""
    rules: dict[str, Callable[[Subject], dict[str, float] | None]] = {
        "entry_point": _entry_point,
        "manifest": _manifest,
        "warnings": _warnings,
        "import_is_light": _import_is_light,
        "nothing_is_patched": _nothing_is_patched,
        "probe": _probe,
        "report_without_environment": _report_without_environment,
        "capabilities": _capabilities,
        "capabilities_repeat": _capabilities_repeat,
        "unknown_option": _unknown_option,
        "explain_error": _explain_error,
        "profile": _profile,
    }
    for name, run in rules.items():
        yield Check(level=0, name=name, run=run)


def _entry_point(subject: Subject) -> None:
    record = subject.record
    require(record.kind == "backend", f"it is offered as {record.kind}")
    package = record.entry_point.value.partition(":")[0].partition(".")[0]
    require(package != HOME, f"its code lies in '{package}', which is the core's")
    if record.distribution != HOME:
        usual = f"{HOME}-{record.name.replace('_', '-')}"
        normal = record.distribution.lower().replace("_", "-")
        require(normal == usual or normal.startswith(HOME), f"its distribution is called "
                f"'{record.distribution}'; third parties use '{usual}'")  # fmt: skip


def _manifest(subject: Subject) -> None:
    manifest = subject.record.manifest
    assert manifest is not None
    lacking = [n for n in ("summary", "remedy", "docs") if not getattr(manifest, n)]
    require(not lacking, f"its manifest has no {', '.join(lacking)}")
    require(manifest.api.older_side() is None, f"it does not work with API {API_VERSION}")
    require(manifest.name == subject.record.name, f"its manifest says '{manifest.name}'")


def _warnings(subject: Subject) -> None:
    found = [warning.message for warning in subject.record.warnings]
    require(not found, "; ".join(found))


def _import_is_light(subject: Subject) -> dict[str, float]:
    answer = fresh.ask("light", subject.record.name, subject.path)
    require(not answer["heavy"], f"importing plugin.py loads {', '.join(answer['heavy'])}")
    seconds = answer["seconds"]
    require(seconds <= _IMPORT_CPU_S, f"importing plugin.py takes {1e3 * seconds:.0f} ms")
    return {"import_ms": round(1e3 * seconds, 2)}


def _nothing_is_patched(subject: Subject) -> dict[str, float]:
    changed = fresh.ask("patches", subject.record.name, subject.path)["changed"]
    shown = ", ".join(changed[:5])
    require(not changed, f"changes {len(changed)} attributes of bedplate: {shown}")
    return {"patched_attributes": 0}


def _probe(subject: Subject) -> dict[str, float]:
    """Quick, and the same every time: the choice rests on it."""
    assert subject.survey.hooks is not None
    request = ProbeRequest()
    begin = time.perf_counter()
    answers = [
        subject.survey.hooks.call(subject.record.key, "bedplate_probe", request=request)
        for _ in range(2)
    ]
    seconds = (time.perf_counter() - begin) / 2
    first, second = answers
    require(first.score == second.score, f"two scores: {first.score}, {second.score}")
    numbers = [device.index for device in first.devices]
    require(len(set(numbers)) == len(numbers), f"two devices share a number: {numbers}")
    require(first.score or first.reasons, "score 0 without a reason")
    require(seconds <= _PROBE_S, f"the probe takes {seconds:.2f} s")
    return {"probe_ms": round(1e3 * seconds, 2)}


def _report_without_environment(subject: Subject) -> None:
    """``doctor`` works where nothing can be found."""
    answer = fresh.ask("report", subject.record.name, subject.path)
    require(answer["probed"], f"the probe fails with {answer['code']} in an empty environment")
    strange = set(answer["items"]) - {ReportItem.__name__}
    require(not strange, f"bedplate_environment_report gives {', '.join(strange)}")


def _capabilities(subject: Subject) -> None:
    have = subject.capabilities
    unknown = [
        name
        for name in (*have.compute_dtypes, *have.kv_dtypes)
        if not isinstance(getattr(torch, name, None), torch.dtype)
    ]
    require(not unknown, f"no dtypes of torch: {', '.join(unknown)}")
    for name in ("compute_dtypes", "kv_dtypes"):
        values = getattr(have, name)
        require(len(set(values)) == len(values), f"{name} names one twice: {values}")
    sizes = have.memory.page_sizes
    require(len(set(sizes)) == len(sizes), f"page_sizes names one twice: {sizes}")
    require("float32" in have.compute_dtypes, "float32 is not among compute_dtypes")
    if have.graph.supported and not have.graph.default:
        require(have.graph.reason, "graphs are off by default without a reason")
    words: list[object] = [word for fact in have.facts.items() for word in fact]
    strange = [word for word in words if not isinstance(word, str)]
    require(not strange, f"facts that are no text: {strange}")


def _capabilities_repeat(subject: Subject) -> None:
    with subject.open() as other:
        same = other.bound.capabilities == subject.capabilities
    require(same, "a second activation declares something else")


def _unknown_option(subject: Subject) -> None:
    """A setting that nobody reads is a typo that nobody sees."""
    options = {subject.record.name: {"no_such_option": "1"}}
    try:
        with subject.open(backend_options=options):
            pass
    except ConfigError:
        return
    except BackendError as error:
        raise Wrong(f"an unknown option gives {error.code}, not a ConfigError") from error
    raise Wrong("an unknown option is ignored in silence")


def _explain_error(subject: Subject) -> None:
    """A sentence or nothing, for anything."""
    for error in (RuntimeError("out of memory"), ValueError(), KeyboardInterrupt()):
        answer = subject.bound.explain_error(error)
        require(answer is None or isinstance(answer, str), f"explains by {type(answer)}")


def _profile(subject: Subject) -> None:
    """Reading it checks it."""
    subject.read_profile()
