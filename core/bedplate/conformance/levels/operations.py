# SPDX-License-Identifier: Apache-2.0
"""L2: every implementation of every operation against its meaning.

The meaning itself is checked on the device too: a backend inherits it for what it has no
kernel for, and then the device's own torch has to be right.
"""

from __future__ import annotations

__all__ = ["checks", "declared"]

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from bedplate.conformance.cases.operations import CASES, OpCase, cases_of
from bedplate.conformance.cases.recorded import recorded_cases
from bedplate.conformance.check import Check, Leave, Wrong, require
from bedplate.conformance.placing import Guards, leaves
from bedplate.contract.decisions import Support
from bedplate.contract.ops import OpRequest
from bedplate.errors import UnsupportedError
from bedplate.reference.closeness import (
    differing_share,
    relative_error,
    rounding_bias,
    worst_ulps,
)
from bedplate.reference.ops import OPERATIONS, PartialProduct

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from bedplate.conformance.subject import Subject
    from bedplate.contract.ops import OpProvider

_ENOUGH = 64
"""Elements from which on shares and means are looked at."""
_BIAS = 0.2
"""Units in the last place that numbers may be off on average."""


def checks(subject: Subject) -> Iterator[Check]:
    """One check per implementation and case, then per implementation and operation."""
    recorded = [] if subject.ops_trace is None else recorded_cases(subject.ops_trace)
    for case in (*CASES, *recorded):
        for provider in subject.bound.ops.providers(case.op):
            yield Check(
                level=2,
                name=f"{case.op}/{_name(provider)}/{case.label}",
                run=partial(_check_case, case, provider),
                declared=declared(subject, provider, case),
                attempt=_harmless(subject, case),
            )
    for op in OPERATIONS:
        for provider in subject.bound.ops.providers(op):
            if provider.kind == "reference":
                continue
            name = f"{op}/{_name(provider)}"
            yield Check(level=2, name=f"{name}/refusals", run=partial(_refusals, op, provider))
            if cases_of(op)[0].rows:
                yield Check(
                    level=2, name=f"{name}/rows_alone", run=partial(_rows_alone, op, provider),
                    declared=_promise(provider), attempt=False,
                )  # fmt: skip


def request_of(case: OpCase, arch: str) -> OpRequest:
    """What the core asks before it uses a case's operation."""
    return OpRequest(op=case.op, dtype=case.dtype, attributes=case.attributes, arch=arch)


def declared(subject: Subject, provider: OpProvider, case: OpCase) -> Support:
    """Whether the backend claims the case: by its dtypes and by ``supports``."""
    known = (*subject.capabilities.compute_dtypes, "int32")
    if case.dtype not in known:
        return Support.no(f"{case.dtype} is not among compute_dtypes")
    try:
        return provider.supports(request_of(case, subject.capabilities.arch))
    except Exception:
        return Support.yes()  # the check itself asks again, and fails by it


def _harmless(subject: Subject, case: OpCase) -> bool:
    """Whether a refused case may be tried: a kernel wrong about dtypes reads foreign memory."""
    return not case.empty and case.dtype in subject.capabilities.compute_dtypes


def run_case(
    case: OpCase, provider: OpProvider, device: torch.device, arguments: dict[str, Any]
) -> tuple[list[Tensor], Guards]:
    """Place the arguments, call, and give results and what was written in place, on the host.

    Raises:
        Wrong: A result shares memory with an argument although it must not.
    """
    guards = Guards(device, spaced=case.spaced, shifted=case.shifted)
    placed = guards.place(arguments)
    result = _whole(provider.call(**placed))
    outputs = [*leaves(result), *leaves(tuple(case.written(placed)))]
    if case.fresh:
        own = {t.untyped_storage().data_ptr() for v in placed.values() for t in leaves(v)}
        shared = [t for t in leaves(result) if t.untyped_storage().data_ptr() in own]
        require(not shared or not shared[0].numel(), "gives an argument's memory as its result")
    return [output.cpu() for output in outputs], guards


def wanted(case: OpCase, arguments: dict[str, Any]) -> list[Tensor]:
    """The meaning of a case on the host, in the order of ``run_case``."""
    wide = {n: v.double() if _is_float(v) else v for n, v in arguments.items()}
    given = wide if case.wide else arguments
    result = _whole(case.meaning(**given))
    dtype = getattr(torch, case.dtype)
    outputs = [t.to(dtype) if case.wide else t for t in leaves(result)]
    return [*outputs, *leaves(tuple(case.written(given)))]


def compare(got: list[Tensor], want: list[Tensor], case: OpCase, factor: float = 1.0) -> float:
    """The largest relative error of several results.

    Args:
        got: What was given, on the host.
        want: What was wanted.
        case: Says how close.
        factor: Widens its tolerances.

    Raises:
        Wrong: One differs by more than is allowed, or in shape or dtype.
    """
    tolerance, ulps = case.tolerance * factor, case.ulps * factor
    require(len(got) == len(want), f"gives {len(got)} results, not {len(want)}")
    worst = 0.0
    for ours, theirs in zip(got, want, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise Wrong(f"gives {_kind(ours)}, not {_kind(theirs)}")
        if not ours.is_floating_point() or tolerance == 0:
            require(torch.equal(ours, theirs), f"{_unequal(ours, theirs)} numbers differ")
            continue
        empty = theirs.isnan()
        require(torch.equal(ours.isnan(), empty), "has NaN elsewhere than it is wanted")
        ours, theirs = ours.masked_fill(empty, 0), theirs.masked_fill(empty, 0)
        error = relative_error(ours, theirs)
        require(error <= tolerance, f"relative error {error:.2e}, allowed {tolerance:.0e}")
        off = worst_ulps(ours, theirs)
        require(off <= ulps, f"one element is {off:.1f} units off, allowed {ulps:g}")
        if ours.element_size() == 2:
            _check_rounding(ours, theirs, min(1.0, case.differing * factor))
        worst = max(worst, error)
    return worst


def _check_rounding(ours: Tensor, theirs: Tensor, most: float) -> None:
    if ours.numel() < _ENOUGH:
        return
    share = differing_share(ours, theirs)
    require(share <= most, f"{share:.0%} of the elements round otherwise, allowed {most:.0%}: "
            "is the order of rounding another?")  # fmt: skip
    bias = rounding_bias(ours, theirs)
    require(
        abs(bias) <= _BIAS,
        f"numbers are off by {bias:+.2f} units on average: are bits cut off, not rounded?",
    )


def _check_case(case: OpCase, provider: OpProvider, subject: Subject) -> dict[str, float]:
    request = request_of(case, subject.capabilities.arch)
    answer = provider.supports(request)
    require(isinstance(answer, Support), f"supports() gives {type(answer).__name__}")
    require(answer or answer.reason, "supports() refuses without a reason")
    want = wanted(case, case.arguments(subject.page_size))
    with subject.bound.runtime.inference_guard():
        got, guards = run_case(
            case, provider, subject.device, case.arguments(subject.page_size)
        )
        again, _ = run_case(case, provider, subject.device, case.arguments(subject.page_size))
    guards.check(case.writes)
    error = compare(got, want, case, subject.tolerance(1.0))
    if provider.determinism != "none" and provider.kind != "reference":
        same = all(_same_bits(a, b) for a, b in zip(got, again, strict=True))
        require(same, f"promises {provider.determinism}, but a second run gives other bits")
    return {"error": error}


def _refusals(op: str, provider: OpProvider, subject: Subject) -> None:
    """What it refuses must be refused by the registry, too, whoever else is asked."""
    known = cases_of(op)[0]
    strange = [
        OpRequest(op=op, dtype="complex128", attributes=known.attributes),
        OpRequest(op=op, dtype=known.dtype, attributes={**known.attributes, "order": "?"}),
        OpRequest(op=op, dtype=known.dtype, attributes={}),
    ]
    for request in strange:
        answer = provider.supports(request)
        require(isinstance(answer, Support), f"supports() gives {type(answer).__name__}")
        require(answer == provider.supports(request), "supports() changes its mind")
        if answer:
            continue
        require(answer.reason, f"refuses {request.dtype} without a reason")
        try:
            chosen = subject.bound.ops.choose(request)
        except UnsupportedError:
            continue
        require(chosen is not provider, "was chosen for a request that it refuses")


def _promise(provider: OpProvider) -> Support:
    if provider.determinism == "batch_invariant":
        return Support.yes()
    return Support.no(f"promises {provider.determinism}, not batch_invariant")


def _rows_alone(op: str, provider: OpProvider, subject: Subject) -> None:
    """Rows that are computed alone, and in another order, have the same bits."""
    looked = 0
    for case in cases_of(op):
        arguments = case.arguments(subject.page_size)
        if not case.rows or not declared(subject, provider, case):
            continue
        count = arguments[case.rows[0]].shape[0]
        if count < 2:
            continue
        looked += 1
        plain = replace(case, spaced=(), shifted=False, fresh=False)
        with subject.bound.runtime.inference_guard():
            whole = _results(plain, provider, subject, torch.arange(count))
            for rows in (torch.tensor([count - 1]), torch.arange(count - 1, -1, -1)):
                part = _results(plain, provider, subject, rows)
                same = all(_same_bits(a[rows], b) for a, b in zip(whole, part, strict=True))
                require(same, f"{case.label}: a row's bits depend on the rows beside it")
    if not looked:
        raise Leave("none of the cases is supported")


def _results(
    case: OpCase, provider: OpProvider, subject: Subject, rows: Tensor
) -> list[Tensor]:
    arguments = case.arguments(subject.page_size)
    chosen = {name: arguments[name][rows] for name in case.rows if arguments[name] is not None}
    return run_case(case, provider, subject.device, arguments | chosen)[0]


def _name(provider: OpProvider) -> str:
    return provider.provider.replace(", ", ".").replace(" ", "_")


def _whole(result: Any) -> Any:
    return result.whole() if isinstance(result, PartialProduct) else result


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        torch.equal(a.nan_to_num(), b.nan_to_num())
        if a.is_floating_point()
        else bool(torch.equal(a, b))
    )


def _unequal(ours: Tensor, theirs: Tensor) -> int:
    return int((ours != theirs).sum())


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
