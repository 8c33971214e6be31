# SPDX-License-Identifier: Apache-2.0
"""Which operations a real run calls, with which arguments: shapes and types, never values.

``TracedOperations`` stands between a model and the registry.  It offers every operation as a
kernel would, so that a model uses all that it could use, also where the backend has nothing
faster.  The file it leads to is replayed by the conformance kit on any backend.
"""

from __future__ import annotations

__all__ = ["TRACE_FORMAT", "OpTrace", "TracedOperations", "read_trace", "signature_of"]

import json
from collections import Counter
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from bedplate.contract.ops import OpProvider, OpRegistry, OpRequest
from bedplate.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bedplate.registry.ops import Operations

TRACE_FORMAT: Final = 1


@dataclass(slots=True)
class OpTrace:
    """Distinct calls and how often each was made.

    Attributes:
        facts: What was run, as text.
    """

    facts: dict[str, str] = field(default_factory=dict)
    _calls: Counter[str] = field(default_factory=Counter)

    def note(self, request: OpRequest, arguments: dict[str, Any]) -> None:
        """Count one call."""
        entry = {
            "op": request.op,
            "dtype": request.dtype,
            "attributes": dict(request.attributes),
            "arguments": {name: signature_of(value) for name, value in arguments.items()},
        }
        self._calls[json.dumps(entry, sort_keys=True)] += 1

    def entries(self) -> Iterator[dict[str, Any]]:
        """Distinct calls, most frequent first, each with its ``count``."""
        for text, count in self._calls.most_common():
            yield {**json.loads(text), "count": count}

    def counts(self) -> dict[str, int]:
        """Operation → distinct calls."""
        return dict(Counter(entry["op"] for entry in self.entries()))

    def write(self, path: Path) -> None:
        """One JSON object a line, the facts first."""
        lines = [{"format": TRACE_FORMAT, "facts": self.facts}, *self.entries()]
        text = "\n".join(json.dumps(line, sort_keys=True) for line in lines)
        path.write_text(text + "\n", encoding="utf-8")


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The calls in a file of ``OpTrace.write``.

    Raises:
        ConfigError: It is no such file.
    """
    try:
        head, *entries = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if head["format"] != TRACE_FORMAT:
            raise ValueError(f"format {head['format']}, not {TRACE_FORMAT}")  # noqa: TRY301
        return [{**entry, "op": str(entry["op"])} for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no trace of operations: {type(error).__name__}: {error}. Make one: "
            "`bedplate trace-ops --out FILE`"
        ) from error


class TracedOperations(OpRegistry):
    """A registry whose providers note their calls.

    Args:
        inner: The registry that chooses.
        trace: Where calls are noted.

    Attributes:
        has_overrides: No: overrides are not tried, since the calls of a trial are no model's.
    """

    has_overrides = False

    def __init__(self, inner: Operations, trace: OpTrace) -> None:
        self._inner = inner
        self._trace = trace

    def register(self, provider: OpProvider) -> None:
        """As the inner registry does."""
        self._inner.register(provider)

    def choose(self, request: OpRequest) -> OpProvider:
        """The inner choice, with its calls noted; never of the kind ``reference``."""
        provider = self._inner.choose(request)
        call = self._noted(request, provider.call)
        return replace(provider, call=call, kind="kernels")

    def withdraw(self, request: OpRequest, provider: OpProvider, reason: str) -> None:
        """As the inner registry does."""
        self._inner.withdraw(request, provider, reason)

    def _noted(self, request: OpRequest, call: Callable[..., Any]) -> Callable[..., Any]:
        from inspect import signature

        from bedplate.reference.ops import OPERATIONS

        parameters = signature(OPERATIONS[request.op])

        def noted(*args: Any, **kwargs: Any) -> Any:
            self._trace.note(request, parameters.bind(*args, **kwargs).arguments)
            return call(*args, **kwargs)

        return noted


def signature_of(value: Any) -> Any:
    """Shape, strides and type of a tensor, the least and largest of integers; records by field.

    Numbers, texts and ``None`` are themselves.
    """
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, torch.dtype):
        return {"dtype": _name(value)}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: signature_of(getattr(value, f.name)) for f in fields(value)}
        return {"record": type(value).__name__, "fields": parts}
    return value


def _tensor(tensor: torch.Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {
        "shape": list(tensor.shape),
        "strides": list(tensor.stride()),
        "tensor": _name(tensor.dtype),
    }
    if not tensor.is_floating_point() and tensor.numel():
        found["range"] = [int(tensor.min()), int(tensor.max())]
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
