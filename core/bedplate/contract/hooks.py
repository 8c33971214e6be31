# SPDX-License-Identifier: Apache-2.0
"""The hook specifications: the whole list of what a plugin can be asked.

Hooks are called at start-up and at the end, never in a step: what they return is frozen into
one ``BoundBackend``, and a monitor raises if a hook is called after that.  An implementation
may take any subset of a hook's arguments, so a new argument breaks nobody.

Mark implementations with ``hookimpl`` and offer the object that holds them (a module or an
instance) as the entry point.  *Scope* says whose implementation is called: every loaded
plugin's, the one being examined, or the selected backend's and its override packs'.
"""

from __future__ import annotations

__all__ = ["PROJECT", "BedplateHooks", "hookimpl", "hookspec"]

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bedplate.contract.attention import AttentionProvider
    from bedplate.contract.capabilities import BackendCapabilities
    from bedplate.contract.conformance import ConformanceProfile
    from bedplate.contract.decisions import Decision
    from bedplate.contract.graph import CompileRequest, GraphRunnerRequest
    from bedplate.contract.manifest import (
        BackendManifest,
        ProbeRequest,
        ProbeResult,
        ReportItem,
    )
    from bedplate.contract.memory import (
        AllocatorRequest,
        KVPool,
        KVPoolRequest,
        TokenToKVPoolAllocator,
    )
    from bedplate.contract.ops import OpRegistry
    from bedplate.contract.runtime import ActivateRequest, DeviceRuntime
    from bedplate.contract.steps import StepStats

PROJECT = "bedplate"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class BedplateHooks:
    """All hooks, in the order in which a start-up calls them."""

    @hookspec
    def bedplate_manifest(self) -> BackendManifest:  # type: ignore[empty-body]
        """Who are you? Stage *inspect*; the plugin examined; required of every plugin."""

    @hookspec
    def bedplate_probe(self, request: ProbeRequest) -> ProbeResult:  # type: ignore[empty-body]
        """Could you run here? Stage *probe*; the backend examined; required of backends.

        At most two seconds; must not create a device context.
        """

    @hookspec
    def bedplate_environment_report(self) -> Sequence[ReportItem]:  # type: ignore[empty-body]
        """What does ``doctor`` print about you? Every plugin; works without hardware."""

    @hookspec
    def bedplate_configure(self, config: Mapping[str, Any]) -> Mapping[str, tuple[Any, str]]:  # type: ignore[empty-body]
        """Which unset settings should differ? Selected backend, before activation.

        Args:
            config: Flat view of the engine's settings; unset ones are ``None``.

        Returns:
            Setting → (value, reason). A setting that the user gave is never changed.
        """

    @hookspec(firstresult=True)
    def bedplate_activate(self, request: ActivateRequest) -> DeviceRuntime:  # type: ignore[empty-body]
        """Take the device in this process. Selected backend; required of backends."""

    @hookspec(firstresult=True)
    def bedplate_capabilities(self, runtime: DeviceRuntime) -> BackendCapabilities:  # type: ignore[empty-body]
        """What can the device do? Selected backend, right after activation; required."""

    @hookspec
    def bedplate_register_ops(self, registry: OpRegistry) -> None:
        """Offer implementations of operations. Selected backend, then override packs."""

    @hookspec
    def bedplate_register_attention(
        self, register: Callable[[AttentionProvider], None]
    ) -> None:
        """Offer attention implementations. Selected backend, then override packs."""

    @hookspec(firstresult=True)
    def bedplate_make_kv_pool(self, request: KVPoolRequest) -> KVPool | None:
        """Make KV storage; ``None`` takes the core's. Selected backend, once per model."""

    @hookspec(firstresult=True)
    def bedplate_make_allocator(
        self, request: AllocatorRequest
    ) -> TokenToKVPoolAllocator | None:
        """Make the slot allocator; ``None`` takes the core's. Selected backend."""

    @hookspec(firstresult=True)
    def bedplate_make_graph_runner(self, request: GraphRunnerRequest) -> Any:
        """Make a ``bedplate.graph.GraphRunner``; ``None`` runs eagerly. Selected backend."""

    @hookspec(firstresult=True)
    def bedplate_compile(self, request: CompileRequest) -> Callable[..., Any] | None:
        """Compile a callable; ``None`` leaves it as it is. Selected backend."""

    @hookspec
    def bedplate_after_load(self, model: Any) -> None:
        """Weights have landed; repack storage in place if it helps. Selected backend.

        Called again after every weight update. Parameter addresses must not change.
        """

    @hookspec(firstresult=True)
    def bedplate_explain_error(self, error: BaseException) -> str | None:
        """Turn a vendor's error into a sentence and a remedy. Selected backend."""

    @hookspec
    def bedplate_conformance_profile(self) -> ConformanceProfile:  # type: ignore[empty-body]
        """Where are you less exact, and what does not work yet? The backend certified.

        Asked by the conformance kit only, never by an engine.
        """

    @hookspec
    def bedplate_decision(self, decision: Decision) -> None:
        """A choice was made. Every loaded plugin; start-up only."""

    @hookspec
    def bedplate_step_finished(self, stats: StepStats) -> None:
        """A step's tokens reached the host. Every loaded plugin.

        Bound at sealing and then called directly, once per step: be quick.
        """

    @hookspec
    def bedplate_shutdown(self) -> None:
        """The engine closes, also after a failed start. Every plugin that was loaded."""
