# SPDX-License-Identifier: Apache-2.0
"""Other uses of the same cases: time them, ask who supports them, list the checks.

``python -m bedplate.conformance.uses USE BACKEND LEVELS [PATTERN …]``; the command line's
``--use`` runs it.
"""

from __future__ import annotations

__all__ = ["main", "support_rows", "timing_rows"]

import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from bedplate.conformance.cases.attention import CALLS, PASSES, AttentionCase
from bedplate.conformance.cases.operations import CASES
from bedplate.conformance.check import matching
from bedplate.conformance.examine import all_checks
from bedplate.conformance.levels.attention import request_of as attention_request
from bedplate.conformance.levels.operations import declared
from bedplate.conformance.plugin import parse_levels
from bedplate.conformance.subject import Subject
from bedplate.errors import BedplateError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bedplate.conformance.cases.operations import OpCase
    from bedplate.contract.ops import OpProvider

Row = list[str]


def support_rows(subject: Subject) -> Iterator[Row]:
    """What, by whom, whether, and why not: of operations, then of kinds of attention calls."""
    for case in CASES:
        for provider in subject.bound.ops.providers(case.op):
            if provider.kind == "reference":
                continue
            answer = declared(subject, provider, case)
            yield [f"{case.op}/{case.label}", provider.provider, *_told(answer)]
    have = subject.capabilities
    for kind, call in CALLS.items():
        for dtype in have.compute_dtypes:
            asked = AttentionCase(
                name=kind, call=call, work=PASSES["decode"], dtype=dtype,
                kv_dtype=dtype if dtype in have.kv_dtypes else have.kv_dtypes[0],
                page_size=subject.page_size,
            )  # fmt: skip
            for attention in subject.bound.attention_providers:
                answer = attention.supports(attention_request(subject, asked))
                yield [f"attention/{kind}.{dtype}", attention.name, *_told(answer)]


def timing_rows(subject: Subject) -> Iterator[Row]:
    """Case, by whom, microseconds, and the bandwidth that the least bytes would give."""
    for case in CASES:
        for provider in subject.bound.ops.providers(case.op):
            if case.nbytes and declared(subject, provider, case):
                seconds = _timed(case, provider, subject)
                rate = case.nbytes / seconds / 1e9
                name = f"{case.op}/{case.label}"
                yield [name, provider.provider, f"{1e6 * seconds:.1f}", f"{rate:.2f}"]


def _told(answer: Any) -> tuple[str, str]:
    return ("yes" if answer else "no"), answer.reason


def _timed(case: OpCase, provider: OpProvider, subject: Subject, runs: int = 30) -> float:
    arguments = {
        name: value.to(subject.device) if isinstance(value, torch.Tensor) else value
        for name, value in case.arguments(subject.page_size).items()
    }
    best = float("inf")
    with subject.bound.runtime.inference_guard():
        for _ in range(runs):
            subject.bound.runtime.synchronize()
            begin = perf_counter()
            provider.call(**arguments)
            subject.bound.runtime.synchronize()
            best = min(best, perf_counter() - begin)
    return best


def main(arguments: Sequence[str]) -> int:
    """Use, backend, levels, patterns; the exit status."""
    use, name, levels, *patterns = arguments
    try:
        subject = Subject(name)
        if use == "list":
            rows = [[check.id] for check in all_checks(subject, parse_levels(levels))]
        else:
            rows = list({"support": support_rows, "time": timing_rows}[use](subject))
        subject.close()
    except (BedplateError, ValueError) as error:
        sys.stderr.write(f"bedplate: {error}\n")
        return 2
    for row in rows:
        if not patterns or any(matching(row[0], pattern) for pattern in patterns):
            sys.stdout.write("\t".join(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
