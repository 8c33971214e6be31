# SPDX-License-Identifier: Apache-2.0
"""How one implementation compares with another on the same arguments: numbers, then time.

Arguments are nests of tensors, dataclasses and sequences.  What an implementation changes in
place counts as a result, so every run gets arguments of its own.
"""

from __future__ import annotations

__all__ = ["Gap", "copied", "gap_between", "seconds_per_call", "tensors_of"]

from dataclasses import dataclass, fields, is_dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bedplate.models.fusion.site import difference, tolerance
from bedplate.reference.ops import PartialProduct

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bedplate.contract.runtime import DeviceRuntime

_ROUNDS = 5
_ROUND_S = 1e-3
_MOST_CALLS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The pair of results that lie furthest apart, against what is allowed there.

    Attributes:
        difference: Largest absolute difference over the largest absolute value.
        limit: Largest acceptable ``difference``; 0 for integers.
    """

    difference: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the difference is acceptable."""
        return self.difference <= self.limit

    @property
    def share(self) -> float:
        """The difference in units of its limit."""
        if not self.difference:
            return 0.0
        return self.difference / self.limit if self.limit else float("inf")

    def __str__(self) -> str:
        return f"differs by {self.difference:.1e}, limit {self.limit:.1e}"


def tensors_of(thing: Any) -> Iterator[Tensor]:
    """Every tensor in a nest, in a fixed order; a product in parts is added up."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, PartialProduct):
        yield thing.whole()
    elif is_dataclass(thing) and not isinstance(thing, type):
        for field in fields(thing):
            yield from tensors_of(getattr(thing, field.name))
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from tensors_of(part)
    elif isinstance(thing, dict):
        for part in thing.values():
            yield from tensors_of(part)


def copied(thing: Any, shared: Callable[[Tensor], bool]) -> Any:
    """The nest with tensors of its own, strides kept, except those that may be ``shared``."""
    if isinstance(thing, Tensor):
        return thing if shared(thing) else _clone(thing)
    if is_dataclass(thing) and not isinstance(thing, type):
        parts = {f.name: copied(getattr(thing, f.name), shared) for f in fields(thing)}
        return replace(thing, **parts)
    if isinstance(thing, list | tuple):
        return type(thing)(copied(part, shared) for part in thing)
    if isinstance(thing, dict):
        return {name: copied(part, shared) for name, part in thing.items()}
    return thing


def gap_between(got: Any, want: Any, *, slack: float = 1.0) -> Gap:
    """How far two results are apart, where it is worst.

    Args:
        got: A nest of tensors.
        want: What it should be.
        slack: Multiplies the tolerance of one sum of products.
    """
    ours, theirs = list(tensors_of(got)), list(tensors_of(want))
    if len(ours) != len(theirs):
        return Gap(difference=float("inf"), limit=0.0)
    gaps = [
        Gap(difference=difference(a, b) if b.numel() else 0.0, limit=slack * tolerance(b.dtype))
        for a, b in zip(ours, theirs, strict=True)
    ]
    return max(gaps, key=lambda gap: gap.share, default=Gap(difference=0.0, limit=0.0))


def seconds_per_call(
    runtime: DeviceRuntime, calls: Sequence[Callable[[], object]]
) -> list[float]:
    """Time of each call, the best of several rounds; rounds take turns.

    The device is waited for once a round, so that a call costs what it costs in a queue.
    """
    best = [float("inf")] * len(calls)
    counts = [_calls_per_round(runtime, call) for call in calls]
    for _ in range(_ROUNDS):
        for place, (call, count) in enumerate(zip(calls, counts, strict=True)):
            begin = perf_counter()
            for _ in range(count):
                call()
            runtime.synchronize()
            best[place] = min(best[place], (perf_counter() - begin) / count)
    return best


def _calls_per_round(runtime: DeviceRuntime, call: Callable[[], object]) -> int:
    call()  # a kernel may be compiled by its first call
    runtime.synchronize()
    begin = perf_counter()
    call()
    runtime.synchronize()
    return max(1, min(_MOST_CALLS, int(_ROUND_S / max(perf_counter() - begin, 1e-9))))


def _clone(x: Tensor) -> Tensor:
    """With the strides of ``x``, which kernels may depend on."""
    if x.is_contiguous() or not x.numel():
        return x.clone()
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    own = x.new_empty(span).as_strided(x.shape, x.stride())
    return own.copy_(x)
