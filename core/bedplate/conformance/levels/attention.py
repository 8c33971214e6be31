# SPDX-License-Identifier: Apache-2.0
"""L3: every attention implementation in every kind of pass, over pages in any order."""

from __future__ import annotations

__all__ = ["checks", "request_of"]

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from bedplate.batch.forward_mode import ForwardMode
from bedplate.conformance.cases.attention import (
    CALLS,
    DTYPES,
    PASSES,
    AttentionCase,
    cases_for,
)
from bedplate.conformance.check import Check, Leave, Wrong, require
from bedplate.conformance.paged import PagedBench
from bedplate.contract.attention import AttentionRequest
from bedplate.contract.decisions import Support
from bedplate.errors import UnsupportedError
from bedplate.reference.closeness import relative_error, worst_ulps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from bedplate.conformance.subject import Subject
    from bedplate.contract.attention import AttentionProvider

_PEAK = 4.0
"""One element may be off by so many times the relative error that all of them may."""


def checks(subject: Subject) -> Iterator[Check]:
    """One check per implementation and case, then properties of each implementation."""
    for provider in subject.bound.attention_providers:
        make = partial(_check_of, provider, subject)
        for case in cases_for(subject.capabilities, _finest(subject, provider)):
            if _serves(provider, case):
                yield _case_check(case, provider, subject)
        yield from _surplus_checks(provider, subject)
        for name in ("chunked", "decode"):
            case = _case(subject, provider, name)
            if not _serves(provider, case):
                continue
            yield make(f"page_order/{name}", partial(_page_order, case, provider), case)
            yield make(f"request_order/{name}", partial(_request_order, case, provider), case)
            yield make(f"repeat/{name}", partial(_repeat, case, provider), case)
            yield Check(
                level=3, name=f"{provider.name}/batch_invariant/{name}", attempt=False,
                run=partial(_batch_invariant, case, provider), declared=_promise(provider),
            )  # fmt: skip
        yield make("idle", partial(_idle, provider), _case(subject, provider, "decode"))
        yield make("never_chosen_when_refused", partial(_refusals, provider), None)


def declared(subject: Subject, provider: AttentionProvider, case: AttentionCase) -> Support:
    """Whether the backend claims the case."""
    have = subject.capabilities
    for value, known, name in (
        (case.dtype, have.compute_dtypes, "compute_dtypes"),
        (case.kv_dtype, have.kv_dtypes, "kv_dtypes"),
        (case.page_size, have.memory.page_sizes, "page_sizes"),
    ):
        if value not in known:
            return Support.no(f"{value} is not among {name}")
    try:
        return provider.supports(request_of(subject, case))
    except Exception:
        return Support.yes()  # the check asks again, and fails by it


def request_of(subject: Subject, case: AttentionCase) -> AttentionRequest:
    """What the core asks before it builds attention for such a call."""
    return AttentionRequest(
        calls=(case.call,), dtype=case.dtype, kv_dtype=case.kv_dtype,
        page_size=case.page_size, arch=subject.capabilities.arch,
    )  # fmt: skip


def _check_of(
    provider: AttentionProvider, subject: Subject, name: str, run: partial[None],
    case: AttentionCase | None,
) -> Check:  # fmt: skip
    claim = Support.yes() if case is None else declared(subject, provider, case)
    return Check(
        level=3, name=f"{provider.name}/{name}", run=run, declared=claim, attempt=False
    )


def _case_check(case: AttentionCase, provider: AttentionProvider, subject: Subject) -> Check:
    return Check(
        level=3, name=f"{provider.name}/case/{case.name}", attempt=False,
        run=partial(_check_case, case, provider), declared=declared(subject, provider, case),
    )  # fmt: skip


def _surplus_checks(provider: AttentionProvider, subject: Subject) -> Iterator[Check]:
    """A kind of call that is refused, tried in every pass: ``supports`` knows no passes."""
    kinds: dict[str, list[AttentionCase]] = {}
    dtype = _finest(subject, provider)
    for case in cases_for(subject.capabilities, dtype):
        if case.harmless(subject.capabilities, dtype) and _serves(provider, case):
            kinds.setdefault(case.name.partition(".")[0], []).append(case)
    for kind, cases in kinds.items():
        claim = declared(subject, provider, cases[0])
        if not claim:
            run = partial(_all_cases, cases, provider)
            yield Check(level=3, name=f"{provider.name}/kind/{kind}", run=run, declared=claim)


def _all_cases(
    cases: list[AttentionCase], provider: AttentionProvider, subject: Subject
) -> None:
    for case in cases:
        _check_case(case, provider, subject)


def _serves(provider: AttentionProvider, case: AttentionCase) -> bool:
    decode = case.work.mode is ForwardMode.DECODE
    return provider.modes in ("all", "decode" if decode else "extend")


def _case(
    subject: Subject, provider: AttentionProvider, work: str, dtype: str = ""
) -> AttentionCase:
    dtype = dtype or _finest(subject, provider)
    return AttentionCase(
        name=work, call=CALLS["plain"], work=PASSES[work], dtype=dtype, kv_dtype=dtype,
        page_size=subject.page_size,
    )  # fmt: skip


def _finest(subject: Subject, provider: AttentionProvider) -> str:
    """The finest dtype in which the implementation serves a plain call."""
    plain = {dtype: _case(subject, provider, "decode", dtype) for dtype in DTYPES}
    served = (dtype for dtype, case in plain.items() if declared(subject, provider, case))
    return next(served, DTYPES[0])


def _check_case(
    case: AttentionCase, provider: AttentionProvider, subject: Subject
) -> dict[str, float]:
    answer = provider.supports(request_of(subject, case))
    require(isinstance(answer, Support), f"supports() gives {type(answer).__name__}")
    require(answer or answer.reason, "supports() refuses without a reason")
    bench = PagedBench(case, subject.bound, provider)
    got, want = bench.run(), bench.wanted()
    require(bool(got.isfinite().all()), f"{int((~got.isfinite()).sum())} numbers are not "
            "finite: it reads slots that no token of the request owns")  # fmt: skip
    limit = subject.tolerance(case.tolerance)
    error = relative_error(got, want)
    require(error <= limit, f"relative error {error:.2e}, allowed {limit:.0e}")
    off, most = worst_ulps(got, want), _PEAK * limit / torch.finfo(got.dtype).eps
    require(off <= most, f"one element is {off:.1f} units off, allowed {most:.1f}")
    return {"error": error}


def _page_order(case: AttentionCase, provider: AttentionProvider, subject: Subject) -> None:
    """The same numbers wherever the pages lie."""
    first, *others = (
        PagedBench(case, subject.bound, provider, order=i).run() for i in range(3)
    )
    for other in others:
        require(torch.equal(first, other), "the result depends on the order of pages")


def _request_order(case: AttentionCase, provider: AttentionProvider, subject: Subject) -> None:
    """A request's numbers are right at any place of the batch."""
    requests = case.work.requests
    for turn in range(1, len(requests)):
        order = requests[turn:] + requests[:turn]
        _check_case(replace(case, work=replace(case.work, requests=order)), provider, subject)


def _repeat(case: AttentionCase, provider: AttentionProvider, subject: Subject) -> None:
    if provider.determinism == "none":
        raise Leave("promises nothing about repeated runs")
    bench = PagedBench(case, subject.bound, provider)
    first = bench.run()
    require(torch.equal(first, bench.run()), f"promises {provider.determinism}, but a second "
            "pass gives other bits")  # fmt: skip


def _promise(provider: AttentionProvider) -> Support:
    if provider.determinism == "batch_invariant":
        return Support.yes()
    return Support.no(f"promises {provider.determinism}, not batch_invariant")


def _batch_invariant(
    case: AttentionCase, provider: AttentionProvider, subject: Subject
) -> None:
    """Each request alone has the bits that it has among the others."""
    whole = PagedBench(case, subject.bound, provider, deterministic=True)
    parts = torch.split(whole.run(), [new for _, new in case.work.requests])
    for row, part in enumerate(parts):
        require(
            torch.equal(part, whole.alone(row, provider)),
            "promises batch_invariant, but the bits of a request depend on those beside it",
        )


def _idle(provider: AttentionProvider, subject: Subject) -> None:
    """A pass without tokens is no work, and no error."""
    case = _case(subject, provider, "decode")
    bench = PagedBench(case, subject.bound, provider)
    batch = replace(bench.batch(), mode=ForwardMode.IDLE)
    call = case.call
    q: Tensor = torch.empty((0, call.num_heads, call.head_dim), device=subject.device)
    out = bench.attention.forward(q, None, None, call, batch)
    require(tuple(out.shape) == (0, call.num_heads, call.value_dim), "idle is not empty")


def _refusals(provider: AttentionProvider, subject: Subject) -> None:
    """What it refuses is refused by the registry, even when it is asked for by name."""
    providers = subject.bound.attention_providers
    refused = 0
    cases = [c for c in cases_for(subject.capabilities) if c.work is PASSES["decode"]]
    strange = replace(cases[0], dtype="complex128", kv_dtype="complex128")
    for case in (*cases, strange):
        request = request_of(subject, case)
        answer = provider.supports(request)
        require(answer == provider.supports(request), "supports() changes its mind")
        if answer:
            continue
        refused += 1
        require(answer.reason, f"refuses {case.name} without a reason")
        try:
            providers.choose_attention(request, provider.name)
        except UnsupportedError as error:
            require(error.code == "HW060", f"refused by {error.code}, not HW060")
        else:
            raise Wrong(f"is chosen for {case.name}, which it refuses")
    require(refused, "supports() never says no, not even to complex numbers")
