# SPDX-License-Identifier: Apache-2.0
"""RunPlan: every "auto" resolved once, each with its reason.

Pure: settings, capabilities and facts about the model go in, a frozen plan and its decisions
come out.  Nothing later asks for a default again.
"""

from __future__ import annotations

__all__ = ["ModelFacts", "RunPlan", "resolve_plan"]

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bedplate.contract.decisions import Candidate, Decision
from bedplate.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bedplate.config import EngineConfig
    from bedplate.contract.capabilities import BackendCapabilities

_DEFAULT_RUNNING = 256
_DEFAULT_CONTEXT = 1 << 15


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the plan must know of a model before it is loaded.

    Attributes:
        dtype: Dtype that the checkpoint names, or ``None``.
        max_position_embeddings: Longest context it was made for, or ``None`` if unlimited.
    """

    dtype: str | None
    max_position_embeddings: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """How one model runs on one backend.

    Attributes:
        dtype: Name of the torch dtype of weights and activations.
        kv_dtype: Name of the torch dtype of keys and values.
        page_size: Tokens a page.
        max_context_len: Most tokens of one request.
        max_running_requests: Most requests in a pass.
        graphs: Whether graphs are captured.
        overlap: Whether the host plans a step while the one before it runs.
        decisions: One per field above.
    """

    dtype: str
    kv_dtype: str
    page_size: int
    max_context_len: int
    max_running_requests: int
    graphs: bool
    overlap: bool
    decisions: tuple[Decision, ...]


def resolve_plan(
    config: EngineConfig, capabilities: BackendCapabilities, model: ModelFacts
) -> RunPlan:
    """Resolve every "auto".

    Raises:
        ConfigError: A setting that was given cannot be met; the message has the allowed ones.
    """
    dtype = _dtype(config.dtype, capabilities, model)
    kv_dtype = _kv_dtype(config.kv_dtype, capabilities, dtype.chosen or "")
    page_size = _page_size(config.page_size, capabilities)
    context = _context(config.max_context_len, model)
    running = _given("max_running_requests", config.max_running_requests, _DEFAULT_RUNNING)
    graphs = _graphs(config.graphs, capabilities)
    overlap = _overlap(config.overlap, capabilities)
    return RunPlan(
        dtype=str(dtype.chosen),
        kv_dtype=str(kv_dtype.chosen),
        page_size=int(str(page_size.chosen)),
        max_context_len=int(str(context.chosen)),
        max_running_requests=int(str(running.chosen)),
        graphs=graphs.chosen == "on",
        overlap=overlap.chosen == "on",
        decisions=(dtype, kv_dtype, page_size, context, running, graphs, overlap),
    )


def _decide(
    point: str, chosen: object, reason: str, others: Iterable[Candidate] = ()
) -> Decision:
    taken = Candidate(name=str(chosen), verdict="chosen", reason=reason)
    return Decision(point=point, chosen=str(chosen), candidates=(taken, *others))


def _among(point: str, given: object, allowed: Sequence[object], whose: str) -> Decision:
    if given not in allowed:
        raise ConfigError(
            f"{point} is {given}, which {whose} cannot do; it can do: "
            f"{', '.join(map(str, allowed))}. Leave it unset to take the best"
        )
    return _decide(point, given, "given")


def _dtype(given: str, capabilities: BackendCapabilities, model: ModelFacts) -> Decision:
    allowed = capabilities.compute_dtypes
    if given != "auto":
        return _among("dtype", given, allowed, "the backend")
    wanted, best = model.dtype, allowed[0]
    if wanted in (None, "float32"):
        # A float32 checkpoint stays exact: nobody asked to round it.
        return _decide("dtype", "float32", f"the checkpoint says {wanted or 'nothing'}")
    if wanted == best:
        return _decide("dtype", wanted, "the checkpoint's, and native here")
    refused = Candidate(
        name=str(wanted),
        verdict="refused",
        reason=f"the checkpoint's, but slower than {best} here",
    )
    if wanted not in allowed or best == "float32":
        return _decide("dtype", best, "loses nothing of the checkpoint's range", [refused])
    return _decide("dtype", wanted, "the checkpoint's")


def _kv_dtype(given: str, capabilities: BackendCapabilities, dtype: str) -> Decision:
    if given != "auto":
        return _among("kv_dtype", given, capabilities.kv_dtypes, "the backend")
    if dtype in capabilities.kv_dtypes:
        return _decide("kv_dtype", dtype, "the model's")
    return _decide("kv_dtype", capabilities.kv_dtypes[0], f"{dtype} cannot be stored")


def _page_size(given: int | None, capabilities: BackendCapabilities) -> Decision:
    allowed = capabilities.memory.page_sizes
    if given is not None:
        return _among("page_size", given, allowed, "the backend")
    others = [
        Candidate(name=str(size), verdict="possible", reason="not preferred")
        for size in allowed[1:]
    ]
    return _decide("page_size", allowed[0], "preferred by the backend", others)


def _context(given: int | None, model: ModelFacts) -> Decision:
    limit = model.max_position_embeddings
    if given is not None and limit is not None and given > limit:
        raise ConfigError(
            f"max_context_len is {given}, but the model was made for {limit} positions. "
            f"Ask for at most {limit}"
        )
    if given is not None:
        return _decide("max_context_len", given, "given")
    if limit is None or limit > _DEFAULT_CONTEXT:
        reason = f"the model allows {limit or 'any length'}; longer contexts must be asked for"
        return _decide("max_context_len", _DEFAULT_CONTEXT, reason)
    return _decide("max_context_len", limit, "the model's")


def _given(point: str, given: int | None, default: int) -> Decision:
    if given is None:
        return _decide(point, default, "default")
    return _decide(point, given, "given")


def _graphs(given: bool | None, capabilities: BackendCapabilities) -> Decision:
    graph = capabilities.graph
    if given and not graph.supported:
        raise ConfigError(
            "Graphs were asked for, but the backend has no graph runner. Run without --graphs"
        )
    if given is not None:
        return _decide("graph", "on" if given else "off", "given")
    if graph.supported and graph.default:
        return _decide("graph", "on", "the backend's default")
    reason = graph.reason if graph.supported else "the backend offers no graph runner"
    refused = Candidate(name="on", verdict="refused", reason=reason)
    return _decide("graph", "off", "passes run eagerly", [refused])


def _overlap(given: bool | None, capabilities: BackendCapabilities) -> Decision:
    if given is not None:
        return _decide("overlap", "on" if given else "off", "given")
    if capabilities.memory.asynchronous:
        return _decide("overlap", "on", "the device works while the host plans")
    return _decide("overlap", "off", "calls have finished when they return: nothing to overlap")
