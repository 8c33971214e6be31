# SPDX-License-Identifier: Apache-2.0
"""Hook implementations of the CUDA backend; imports nothing heavy."""

from __future__ import annotations

__all__ = ["backend"]

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
from bedplate_cuda import driver

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bedplate.graph.runner import GraphRunner

_SENTENCES = {
    "no kernel image": "The installed torch has no code for this architecture. Install "
    "a build of torch that names it in torch.cuda.get_arch_list()",
    "out of memory": "The device has too little free memory. Set --mem-fraction or "
    "--max-total-tokens lower, run fewer requests with --max-running-requests, or end other "
    "processes on the device",
}
"""What a vendor's message contains, and what we say about it."""


class CudaBackend:
    """The entry point of the backend."""

    @hookimpl
    def bedplate_manifest(self) -> BackendManifest:
        """Identity; Triton is a requirement of the extra."""
        return BackendManifest(
            name="cuda",
            summary="NVIDIA GPUs from compute capability 8.0, with Triton kernels",
            api=ApiRange(needs=(1, 0)),
            remedy="Install NVIDIA's driver and a CUDA build of torch, then "
            "`pip install 'bedplate[cuda]'`.",
            docs="docs/how-to/choose-a-backend.md",
        )

    @hookimpl
    def bedplate_probe(self, request: ProbeRequest) -> ProbeResult:
        """Device nodes, the driver's files and torch's metadata; no context, no torch."""
        return driver.probe(request.environment)

    @hookimpl
    def bedplate_environment_report(self) -> Sequence[ReportItem]:
        """Driver, devices and the build of torch, as found."""
        devices = ", ".join(gpu.name for gpu in driver.gpus())
        build = driver.torch_build()
        return [
            ReportItem(name="driver", value=driver.driver_version() or "none"),
            ReportItem(name="devices", value=devices or "none"),
            ReportItem(name="build of torch", value=build.problem or build.version),
        ]

    @hookimpl
    def bedplate_configure(self, config: Mapping[str, Any]) -> Mapping[str, tuple[Any, str]]:
        """Long passes: a device that multiplies so fast is not filled by short ones."""
        return {"chunked_prefill_tokens": (4096, "fills the device, and takes little memory")}

    @hookimpl
    def bedplate_activate(self, request: ActivateRequest) -> DeviceRuntime:
        """Take the device: the context is created here."""
        from bedplate_cuda.runtime import CudaRuntime

        return CudaRuntime(request)

    @hookimpl
    def bedplate_capabilities(self, runtime: DeviceRuntime) -> BackendCapabilities:
        """What the activated device can do."""
        from bedplate_cuda.runtime import capabilities

        return capabilities(runtime)

    @hookimpl
    def bedplate_register_ops(self, registry: OpRegistry) -> None:
        """Triton's operations."""
        from bedplate_cuda.ops import register

        register(registry)

    @hookimpl
    def bedplate_register_attention(
        self, register: Callable[[AttentionProvider], None]
    ) -> None:
        """Triton's attention over the paged cache."""
        from bedplate_cuda.attention import provider

        register(provider)

    @hookimpl
    def bedplate_make_graph_runner(self, request: GraphRunnerRequest) -> GraphRunner:
        """Recorded decode."""
        from bedplate_cuda.graph import CudaGraphRunner

        return CudaGraphRunner(request)

    @hookimpl
    def bedplate_explain_error(self, error: BaseException) -> str | None:
        """A sentence for the messages that users meet most."""
        text = str(error).lower()
        return next((sentence for part, sentence in _SENTENCES.items() if part in text), None)


backend = CudaBackend()
