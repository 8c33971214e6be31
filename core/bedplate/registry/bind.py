# SPDX-License-Identifier: Apache-2.0
"""Stage 5: activate the selected backend, freeze what it offers, and seal the hooks.

The result holds plain callables and no pluggy: hooks cost microseconds and belong to
start-up.  If anything fails on the way, everything that was taken is given back.
"""

from __future__ import annotations

__all__ = ["BindRequest", "BoundBackend", "bind_backend"]

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bedplate.contract.capabilities import BackendCapabilities
from bedplate.contract.memory import (
    AllocatorRequest,
    KVPool,
    KVPoolRequest,
    TokenToKVPoolAllocator,
)
from bedplate.contract.runtime import ActivateRequest, DeviceRuntime
from bedplate.registry.attention import AttentionProviders
from bedplate.registry.binding import Binding, capability_problems
from bedplate.registry.configure import apply_proposals
from bedplate.registry.fuel import Fuel
from bedplate.registry.ops import Operations
from bedplate.registry.packs import register_packs

if TYPE_CHECKING:
    from bedplate.config import EngineConfig
    from bedplate.contract.attention import AttentionProvider
    from bedplate.contract.capabilities import DeterminismClass
    from bedplate.contract.decisions import Decision
    from bedplate.contract.graph import CompileRequest, GraphRunnerRequest
    from bedplate.contract.manifest import BackendManifest
    from bedplate.contract.ops import OpRegistry
    from bedplate.contract.steps import StepStats
    from bedplate.registry.decisions import DecisionLog
    from bedplate.registry.records import PluginRecord, Survey

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundBackend:
    """One activated backend; all that the core keeps of the registry.

    Attributes:
        name: The backend's name.
        manifest: Its own words.
        device_index: Which of its devices was taken.
        config: The user's configuration with the backend's proposals.
        runtime: The device.
        capabilities: What it can do; checked.
        ops: Implementations of operations.
        attention_providers: Implementations of attention.
        make_kv_pool: ``None`` answers take the core's pool.
        make_allocator: ``None`` answers take the core's allocator.
        make_graph_runner: ``None`` answers run eagerly.
        compile: ``None`` answers leave the callable as it is.
        after_load: To be called after weights have landed; raises what went wrong.
        explain_error: Sentence for a vendor's error, or ``None``; never raises.
        step_observers: Called with each step's statistics; never raise.
        decision_observers: Told every decision; already subscribed to the log.
        shutdown: Gives everything back, once; later calls do nothing. Never raises.
        fuel: How many kernels may be used.
    """

    name: str
    manifest: BackendManifest
    device_index: int
    config: EngineConfig
    runtime: DeviceRuntime
    capabilities: BackendCapabilities
    ops: Operations
    attention_providers: AttentionProviders
    make_kv_pool: Callable[[KVPoolRequest], KVPool | None]
    make_allocator: Callable[[AllocatorRequest], TokenToKVPoolAllocator | None]
    make_graph_runner: Callable[[GraphRunnerRequest], Any]
    compile: Callable[[CompileRequest], Callable[..., Any] | None]
    after_load: Callable[[Any], None]
    explain_error: Callable[[BaseException], str | None]
    step_observers: tuple[Callable[[StepStats], None], ...]
    decision_observers: tuple[Callable[[Decision], object], ...]
    shutdown: Callable[[], None]
    fuel: Fuel = field(default_factory=Fuel)


@dataclass(frozen=True, slots=True, kw_only=True)
class BindRequest:
    """What binding needs besides the survey.

    Attributes:
        record: The selected backend.
        device_index: Which of its devices.
        config: The user's configuration.
        reference_ops: Operation → plain-torch meaning.
        decisions: Receives every choice.
        environment: Process environment, read-only.
        rank: This process's number.
        world_size: Processes that serve one model.
    """

    record: PluginRecord
    device_index: int
    config: EngineConfig
    reference_ops: Mapping[str, Callable[..., Any]]
    decisions: DecisionLog
    environment: Mapping[str, str]
    rank: int = 0
    world_size: int = 1


def bind_backend(request: BindRequest, survey: Survey) -> BoundBackend:
    """Activate, collect, freeze, seal.

    Raises:
        BackendError: A hook raised (HW041, HW021) or broke the contract (HW044); whatever
            was loaded has been told to shut down.
    """
    assert survey.hooks is not None
    observers = _decision_observers(survey)
    for observer in observers:
        request.decisions.subscribe(observer)
    binding = Binding(record=request.record, survey=survey)
    try:
        return _bind(request, binding, observers)
    except BaseException:
        binding.shutdown()
        raise
    finally:
        survey.hooks.seal()


def _bind(
    request: BindRequest, binding: Binding, observers: tuple[Callable[[Decision], object], ...]
) -> BoundBackend:
    record, decisions = request.record, request.decisions
    config = _configure(request, binding)
    runtime = _activate(request, binding, config)
    capabilities = _capabilities(binding, runtime)
    strict: DeterminismClass = "batch_invariant" if config.deterministic else "none"
    ops = Operations(request.reference_ops, decisions, record.name, strict)
    attention = AttentionProviders(decisions, record.name)
    _register(binding, ops, attention)
    register_packs(binding.survey, record.name, ops, attention, decisions)
    assert record.manifest is not None
    return BoundBackend(
        name=record.name,
        manifest=record.manifest,
        device_index=request.device_index,
        config=config,
        runtime=runtime,
        capabilities=capabilities,
        ops=ops,
        attention_providers=attention,
        make_kv_pool=binding.factory("bedplate_make_kv_pool", KVPool),
        make_allocator=binding.factory("bedplate_make_allocator", TokenToKVPoolAllocator),
        make_graph_runner=binding.factory("bedplate_make_graph_runner", None),
        compile=binding.factory("bedplate_compile", Callable),
        after_load=binding.factory("bedplate_after_load", None),
        explain_error=binding.explain_error,
        step_observers=_step_observers(binding.survey),
        decision_observers=observers,
        shutdown=binding.shutdown,
        fuel=Fuel.from_environment(request.environment),
    )


def _configure(request: BindRequest, binding: Binding) -> EngineConfig:
    flat = request.config.flat()
    proposals = binding.ask("bedplate_configure", config=flat)
    return apply_proposals(request.config, proposals, request.record, request.decisions)


def _activate(request: BindRequest, binding: Binding, config: EngineConfig) -> DeviceRuntime:
    question = ActivateRequest(
        device_index=request.device_index,
        rank=request.rank,
        world_size=request.world_size,
        options=config.backend_options.get(request.record.name, {}),
        environment=request.environment,
    )
    runtime = binding.ask("bedplate_activate", request=question)
    if not isinstance(runtime, DeviceRuntime):
        problem = f"it gave {type(runtime).__name__}, not a DeviceRuntime"
        raise binding.broken("bedplate_activate", [problem])
    binding.runtime = runtime
    return runtime


def _capabilities(binding: Binding, runtime: DeviceRuntime) -> BackendCapabilities:
    capabilities = binding.ask("bedplate_capabilities", runtime=runtime)
    problems = capability_problems(capabilities, runtime)
    if problems:
        raise binding.broken("bedplate_capabilities", problems)
    assert isinstance(capabilities, BackendCapabilities)
    return capabilities


def _register(binding: Binding, ops: OpRegistry, attention: AttentionProviders) -> None:
    def register(provider: AttentionProvider) -> None:
        attention.register(provider)

    binding.ask("bedplate_register_ops", registry=ops)
    binding.ask("bedplate_register_attention", register=register)


def _decision_observers(survey: Survey) -> tuple[Callable[[Decision], object], ...]:
    return tuple(
        function for _record, function in _implementations(survey, "bedplate_decision")
    )


def _step_observers(survey: Survey) -> tuple[Callable[[StepStats], None], ...]:
    found = _implementations(survey, "bedplate_step_finished")
    return tuple(_quiet(record, function) for record, function in found)


def _implementations(
    survey: Survey, hook: str
) -> list[tuple[PluginRecord, Callable[[Any], Any]]]:
    assert survey.hooks is not None
    found = [
        (record, survey.hooks.implementation(record.key, hook))
        for record in survey.records
        if record.status == "loaded"
    ]
    return [(record, function) for record, function in found if function is not None]


def _quiet(record: PluginRecord, observe: Callable[[Any], Any]) -> Callable[[StepStats], None]:
    """An observer that stops observing when it raises, so that no step is lost to it."""
    works = True

    def tell(stats: StepStats) -> None:
        nonlocal works
        if not works:
            return
        try:
            observe(stats)
        except Exception:
            works = False
            _log.exception("Plugin '%s' raised in step_finished; not told again", record.name)

    return tell
