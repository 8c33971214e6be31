# SPDX-License-Identifier: Apache-2.0
"""Hook implementations of the acme backend; imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bedplate.contract import (
    ActivateRequest,
    ApiRange,
    AttentionProvider,
    BackendCapabilities,
    BackendManifest,
    DeviceFacts,
    DeviceRuntime,
    MemoryCapabilities,
    OpRegistry,
    ProbeRequest,
    ProbeResult,
    hookimpl,
)

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = "cpu"
"""Device string of your torch extension."""

SCORE = 40
"""Below the processor's 50, so ``auto`` goes on as before; accelerators say 500."""


class Acme:
    """The entry point of the backend."""

    @hookimpl
    def bedplate_manifest(self) -> BackendManifest:
        """Identity, and what to do where the probe says no."""
        return BackendManifest(
            name="acme",
            summary="acme devices through plain torch",
            api=ApiRange(needs=(1, 0)),
            remedy="Unset ACME_HIDDEN.",
            docs="README.md",
        )

    @hookimpl
    def bedplate_probe(self, request: ProbeRequest) -> ProbeResult:
        """Whether a device is here; look for your driver, and import no torch."""
        if request.environment.get("ACME_HIDDEN"):
            return ProbeResult(score=0, reasons=("ACME_HIDDEN is set",))
        device = DeviceFacts(index=0, name="acme one")
        return ProbeResult(score=SCORE, devices=(device,))

    @hookimpl
    def bedplate_activate(self, request: ActivateRequest) -> DeviceRuntime:
        """Take the device; import your torch extension here."""
        from bedplate.errors import ConfigError
        from bedplate.reference.runtime import TorchRuntime

        if request.options:
            unread = ", ".join(sorted(request.options))
            raise ConfigError(f"Backend 'acme' has no option {unread}; it has none")
        return TorchRuntime(f"{DEVICE}:{request.device_index}")

    @hookimpl
    def bedplate_capabilities(self) -> BackendCapabilities:
        """What the device can do: only what the conformance kit confirms."""
        return BackendCapabilities(
            device_type=DEVICE,
            compute_dtypes=("float32", "bfloat16"),
            kv_dtypes=("float32", "bfloat16"),
            # The host's memory is the device's; not so on a device with its own.
            memory=MemoryCapabilities(unified=True, page_sizes=(16, 1)),
        )

    @hookimpl
    def bedplate_register_ops(self, registry: OpRegistry) -> None:
        """Operations with a faster form than the reference."""
        from bedplate_acme.ops import register

        register(registry)

    @hookimpl
    def bedplate_register_attention(
        self, register: Callable[[AttentionProvider], None]
    ) -> None:
        """Batched attention over the paged cache."""
        from bedplate_acme.attention import provider

        register(provider)


backend = Acme()
