# SPDX-License-Identifier: Apache-2.0
"""Hook implementations of the simulated accelerator; imports nothing heavy."""

from __future__ import annotations

__all__ = ["backend"]

from typing import TYPE_CHECKING, Any

from bedplate.contract import (
    ActivateRequest,
    ApiRange,
    AttentionProvider,
    BackendCapabilities,
    BackendManifest,
    DeviceFacts,
    DeviceRuntime,
    GraphRunnerRequest,
    ProbeRequest,
    ProbeResult,
    ReportItem,
    hookimpl,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bedplate.graph.runner import GraphRunner

_DEVICES = 4
_REQUESTS = 16
_WHY = "the host does the work: small passes and few graphs"


class SimBackend:
    """The entry point of the backend."""

    @hookimpl
    def bedplate_manifest(self) -> BackendManifest:
        """Identity; needs nothing beyond bedplate itself."""
        return BackendManifest(
            name="sim",
            summary="simulated accelerator: queues, events, graphs and memory without a device",
            api=ApiRange(needs=(1, 0)),
            remedy="The simulated device needs only torch: pip install bedplate-sim",
            docs="docs/explanation/simulated-device.md",
        )

    @hookimpl
    def bedplate_probe(self, request: ProbeRequest) -> ProbeResult:
        """Always there, for those who name it."""
        devices = tuple(
            DeviceFacts(index=index, name="simulated device", arch="sim")
            for index in range(_DEVICES)
        )
        return ProbeResult(score=1, devices=devices, only_by_name=True)

    @hookimpl
    def bedplate_environment_report(self) -> Sequence[ReportItem]:
        """That it is no device."""
        return [ReportItem(name="device", value="simulated by the host; times mean nothing")]

    @hookimpl
    def bedplate_configure(self, config: Mapping[str, Any]) -> Mapping[str, tuple[Any, str]]:
        """Few requests at once."""
        return {"max_running_requests": (_REQUESTS, _WHY)}

    @hookimpl
    def bedplate_activate(self, request: ActivateRequest) -> DeviceRuntime:
        """Take the device."""
        from bedplate_sim.runtime import SimRuntime

        return SimRuntime(request)

    @hookimpl
    def bedplate_capabilities(self, runtime: DeviceRuntime) -> BackendCapabilities:
        """What the options let it be."""
        from bedplate_sim.runtime import capabilities

        return capabilities(runtime)

    @hookimpl
    def bedplate_register_attention(
        self, register: Callable[[AttentionProvider], None]
    ) -> None:
        """Attention that can be recorded."""
        from bedplate_sim.attention import provider

        register(provider)

    @hookimpl
    def bedplate_make_graph_runner(self, request: GraphRunnerRequest) -> GraphRunner | None:
        """Recorded decode."""
        from bedplate_sim.graph import SimGraphRunner
        from bedplate_sim.runtime import SimRuntime

        assert isinstance(request.runtime, SimRuntime)
        return SimGraphRunner(request) if request.runtime.simulated.options.graphs else None

    @hookimpl
    def bedplate_explain_error(self, error: BaseException) -> str | None:
        """What to do where the device is full."""
        if "simulated device out of memory" not in str(error):
            return None
        return (
            "The simulated device has too little free memory. Give it more with the option "
            "memory of backend_options.sim, or run fewer or shorter requests"
        )


backend = SimBackend()
