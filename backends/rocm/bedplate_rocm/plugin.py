# SPDX-License-Identifier: Apache-2.0
"""Hook implementations of the ROCm backend; imports nothing heavy."""

from __future__ import annotations

__all__ = ["backend"]

import os
from typing import TYPE_CHECKING, Any

from bedplate.contract import (
    ActivateRequest,
    ApiRange,
    AttentionProvider,
    BackendCapabilities,
    BackendManifest,
    DeviceRuntime,
    GraphRunnerRequest,
    OpRegistry,
    ProbeRequest,
    ProbeResult,
    ReportItem,
    hookimpl,
)
from bedplate_rocm import driver, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bedplate.graph.runner import GraphRunner

_SENTENCES = {
    "no kernel image": "The installed torch has no code for this architecture. Install "
    "a build of torch that names it in torch.cuda.get_arch_list()",
    "invalid device function": "The installed torch has no code for this architecture. Install "
    "a build of torch that names it in torch.cuda.get_arch_list()",
    "out of memory": "The device has too little free memory. Set --mem-fraction or "
    "--max-total-tokens lower, run fewer requests with --max-running-requests, or end other "
    "processes on the device",
    "memory access fault": "A kernel read or wrote where nothing is. Run once with "
    "AMD_SERIALIZE_KERNEL=3 and without graphs to see which, and report it",
}
"""What a vendor's message contains, and what we say about it."""


class RocmBackend:
    """The entry point of the backend."""

    @hookimpl
    def bedplate_manifest(self) -> BackendManifest:
        """Identity; torch and its Triton come from the vendor, so nothing is required."""
        return BackendManifest(
            name="rocm",
            summary="AMD GPUs (compile-checked, not yet run on one), with Triton kernels",
            api=ApiRange(needs=(1, 0)),
            remedy="Install AMD's driver, then torch for ROCm by the command that pytorch.org "
            "shows under 'Get started' for your version of ROCm (its Triton comes with it).",
            docs="docs/how-to/use-an-amd-gpu.md",
        )

    @hookimpl
    def bedplate_probe(self, request: ProbeRequest) -> ProbeResult:
        """Device nodes, the driver's files and torch's metadata; no context, no torch."""
        return driver.probe(request.environment)

    @hookimpl
    def bedplate_environment_report(self) -> Sequence[ReportItem]:
        """Driver, devices, the build of torch, and settings of the environment."""
        devices = ", ".join(f"{gpu.name} {gpu.arch}" for gpu in driver.gpus())
        build = driver.torch_build()
        return [
            ReportItem(name="driver", value=driver.driver_version() or "none"),
            ReportItem(name="devices", value=devices or "none"),
            ReportItem(name="build of torch", value=build.problem or build.version),
            *(settings.report(os.environ) if devices else ()),
        ]

    @hookimpl
    def bedplate_configure(self, config: Mapping[str, Any]) -> Mapping[str, tuple[Any, str]]:
        """Long passes: a device that multiplies so fast is not filled by short ones."""
        return {"chunked_prefill_tokens": (8192, "fills the device, in few passes")}

    @hookimpl
    def bedplate_activate(self, request: ActivateRequest) -> DeviceRuntime:
        """Take the device: the context is created here."""
        from bedplate_rocm.runtime import HipRuntime

        return HipRuntime(request)

    @hookimpl
    def bedplate_capabilities(self, runtime: DeviceRuntime) -> BackendCapabilities:
        """What the activated device can do."""
        from bedplate_rocm.runtime import capabilities

        return capabilities(runtime)

    @hookimpl
    def bedplate_register_ops(self, registry: OpRegistry) -> None:
        """Triton's operations."""
        from bedplate_rocm.ops import register

        register(registry)

    @hookimpl
    def bedplate_register_attention(
        self, register: Callable[[AttentionProvider], None]
    ) -> None:
        """Triton's attention over the paged cache, and AITER's where it is installed."""
        from bedplate_rocm.attention import providers

        for provider in providers():
            register(provider)

    @hookimpl
    def bedplate_make_graph_runner(self, request: GraphRunnerRequest) -> GraphRunner:
        """Recorded decode."""
        from bedplate_rocm.graph import HipGraphRunner

        return HipGraphRunner(request)

    @hookimpl
    def bedplate_explain_error(self, error: BaseException) -> str | None:
        """A sentence for the messages that users meet most."""
        text = str(error).lower()
        return next((sentence for part, sentence in _SENTENCES.items() if part in text), None)


backend = RocmBackend()
