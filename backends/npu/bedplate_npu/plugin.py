# SPDX-License-Identifier: Apache-2.0
"""Hook implementations of the Ascend NPU backend; imports nothing heavy."""

from __future__ import annotations

__all__ = ["backend"]

import os
from typing import TYPE_CHECKING

from bedplate.contract import (
    ActivateRequest,
    ApiRange,
    AttentionProvider,
    BackendCapabilities,
    BackendManifest,
    DeviceRuntime,
    GraphRunnerRequest,
    KVPool,
    KVPoolRequest,
    OpRegistry,
    ProbeRequest,
    ProbeResult,
    ReportItem,
    hookimpl,
)
from bedplate_npu import availability

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bedplate.graph.runner import GraphRunner

_SENTENCES = {
    "out of memory": "The device has too little free memory. Set --mem-fraction or "
    "--max-total-tokens lower, or run fewer requests with --max-running-requests",
    "107027": "Something waited for the device while a graph was captured. Run with "
    "--no-graphs, and report the model",
    "107030": "Something copied synchronously while a graph was captured. Run with "
    "--no-graphs, and report the model",
    "207008": "The device has no stream left for graphs. Capture fewer sizes with "
    "--capture-sizes, or end other processes on the device",
    "libatb.so": "An operator of the NNAL package was called, which this backend never needs. "
    "Report what you ran",
}
"""What a vendor's message contains, and what we say about it."""


class NpuBackend:
    """The entry point of the backend."""

    def __init__(self) -> None:
        self._off: Mapping[str, str] = {}

    @hookimpl
    def bedplate_manifest(self) -> BackendManifest:
        """Identity; torch_npu is a requirement of the extra."""
        return BackendManifest(
            name="npu",
            summary=f"Ascend NPUs (Atlas A2, A3) through torch_npu; {availability.EVIDENCE}",
            api=ApiRange(needs=(1, 0)),
            remedy="Install the driver and CANN, run its set_env.sh, then "
            "`pip install 'bedplate[npu]'` beside the CPU build of the same torch.",
            docs="docs/how-to/run-on-ascend.md",
        )

    @hookimpl
    def bedplate_probe(self, request: ProbeRequest) -> ProbeResult:
        """Device nodes, libraries and metadata; neither torch nor torch_npu."""
        return availability.probe(request.environment)

    @hookimpl
    def bedplate_environment_report(self) -> Sequence[ReportItem]:
        """Everything that can be said without a device, each with its remedy."""
        versions, found = availability.installed(), availability.devices(os.environ)
        graphs = availability.graph_problem(os.environ)
        torch, cann = (
            availability.torch_problem(versions),
            availability.cann_problem(os.environ),
        )
        simulated = os.environ.get(availability.SIMULATED)
        return [
            ReportItem(name="evidence", value=availability.EVIDENCE),
            _line("torch_npu", versions.torch_npu or "not installed", torch),
            _line("CANN", "libraries missing" if cann else "libraries found", cann),
            ReportItem(name="driver", value=availability.driver_version() or "none"),
            ReportItem(name="devices", value=", ".join(found) or "none"),
            _line("graphs", "cannot be captured" if graphs else "can be captured", graphs),
            _line(
                "runtime",
                f"simulated ({simulated})" if simulated else "the device's own",
                f"{availability.SIMULATED} is set: nothing here shows what a device does, and "
                "no timing counts. Unset it"
                if simulated
                else "",
            ),
        ]

    @hookimpl
    def bedplate_activate(self, request: ActivateRequest) -> DeviceRuntime:
        """Take the device: torch_npu is imported here."""
        from bedplate_npu.runtime import NpuRuntime

        return NpuRuntime(request)

    @hookimpl
    def bedplate_capabilities(self, runtime: DeviceRuntime) -> BackendCapabilities:
        """What the activated device can do, by its family and the self-test."""
        from bedplate_npu.runtime import NpuRuntime, capabilities

        answer = capabilities(runtime)
        self._off = runtime.off if isinstance(runtime, NpuRuntime) else {}
        return answer

    @hookimpl
    def bedplate_register_ops(self, registry: OpRegistry) -> None:
        """Norms, gated activations and rotation by fused operators."""
        from bedplate_npu.ops import register

        register(registry)

    @hookimpl
    def bedplate_register_attention(
        self, register: Callable[[AttentionProvider], None]
    ) -> None:
        """Fused-infer attention over the paged cache."""
        from bedplate_npu.attention import make_provider

        register(make_provider(self._off))

    @hookimpl
    def bedplate_make_kv_pool(self, request: KVPoolRequest) -> KVPool:
        """Pages as the attention reads them."""
        from bedplate_npu.memory import NpuKVPool

        return NpuKVPool(request)

    @hookimpl
    def bedplate_make_graph_runner(self, request: GraphRunnerRequest) -> GraphRunner | None:
        """Recorded decode, unless the attention cannot be recorded."""
        from bedplate_npu.graph import make_graph_runner

        return make_graph_runner(request)

    @hookimpl
    def bedplate_explain_error(self, error: BaseException) -> str | None:
        """A sentence for the messages that users meet most."""
        text = str(error).lower()
        return next((sentence for part, sentence in _SENTENCES.items() if part in text), None)


def _line(name: str, value: str, problem: str) -> ReportItem:
    """``ok``, or ``warn`` with the problem, which ends in what to do."""
    return ReportItem(
        name=name, value=value, status="warn" if problem else "ok", remedy=problem
    )


backend = NpuBackend()
