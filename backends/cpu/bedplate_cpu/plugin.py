# SPDX-License-Identifier: Apache-2.0
"""Hook implementations of the CPU backend; imports nothing heavy."""

from __future__ import annotations

__all__ = ["backend"]

from typing import TYPE_CHECKING, Any

from bedplate.contract import (
    ActivateRequest,
    ApiRange,
    AttentionProvider,
    BackendCapabilities,
    BackendManifest,
    CompileRequest,
    DeviceFacts,
    DeviceRuntime,
    GraphRunnerRequest,
    OpRegistry,
    ProbeRequest,
    ProbeResult,
    ReportItem,
    hookimpl,
)
from bedplate_cpu import topology

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bedplate.graph.runner import GraphRunner

_SCORE = 50


class CpuBackend:
    """The entry point of the backend."""

    @hookimpl
    def bedplate_manifest(self) -> BackendManifest:
        """Identity; needs nothing beyond bedplate itself."""
        return BackendManifest(
            name="cpu",
            summary="host processor through plain torch; runs everywhere",
            api=ApiRange(needs=(1, 0)),
            remedy="The CPU backend needs only torch: pip install 'bedplate[cpu]'",
            docs="docs/how-to/choose-a-backend.md",
        )

    @hookimpl
    def bedplate_probe(self, request: ProbeRequest) -> ProbeResult:
        """A processor is always there; reads /proc, never torch."""
        host = topology.read()
        device = DeviceFacts(
            index=0, name=host.model_name, arch=host.arch, memory_bytes=host.memory_bytes
        )
        return ProbeResult(score=_SCORE, devices=(device,), facts=host.facts())

    @hookimpl
    def bedplate_environment_report(self) -> Sequence[ReportItem]:
        """Processor, instruction sets, cores and their binding."""
        host = topology.read()
        return [ReportItem(name=name, value=value) for name, value in host.facts().items()]

    @hookimpl
    def bedplate_activate(self, request: ActivateRequest) -> DeviceRuntime:
        """Bind threads and take the processor."""
        from bedplate_cpu.runtime import CpuRuntime

        return CpuRuntime(request)

    @hookimpl
    def bedplate_capabilities(self, runtime: DeviceRuntime) -> BackendCapabilities:
        """What this processor is good at."""
        from bedplate_cpu.runtime import capabilities

        return capabilities(topology.read())

    @hookimpl
    def bedplate_register_ops(self, registry: OpRegistry) -> None:
        """Operations with a faster form than the reference."""
        from bedplate_cpu.ops import register

        register(registry)

    @hookimpl
    def bedplate_register_attention(
        self, register: Callable[[AttentionProvider], None]
    ) -> None:
        """Batched attention over the paged cache."""
        from bedplate_cpu.attention import providers

        for provider in providers():
            register(provider)

    @hookimpl
    def bedplate_make_graph_runner(self, request: GraphRunnerRequest) -> GraphRunner:
        """One compiled forward per bucket."""
        from bedplate_cpu.graph import CompiledRunner

        return CompiledRunner(request)

    @hookimpl
    def bedplate_compile(self, request: CompileRequest) -> Callable[..., Any]:
        """torch.compile with static or dynamic sizes."""
        import torch

        return torch.compile(request.function, dynamic=request.dynamic)


backend = CpuBackend()
