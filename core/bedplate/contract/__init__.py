# SPDX-License-Identifier: Apache-2.0
"""The contract: everything a backend author reads, and nothing else.

Importing it loads neither torch nor transformers.  A backend package uses these names,
``bedplate.reference`` to inherit from, ``bedplate.graph`` for its graph runner, and
``bedplate.errors``.
"""

from __future__ import annotations

from bedplate.contract.attention import (
    AttentionBackend,
    AttentionBuild,
    AttentionCallSpec,
    AttentionProvider,
    AttentionRequest,
)
from bedplate.contract.capabilities import (
    BackendCapabilities,
    GraphCapabilities,
    MemoryCapabilities,
)
from bedplate.contract.conformance import (
    ConformanceProfile,
    KnownGap,
    WiderTolerance,
)
from bedplate.contract.decisions import Candidate, Decision, Support
from bedplate.contract.graph import CompileRequest, GraphRunnerRequest
from bedplate.contract.hooks import PROJECT, BedplateHooks, hookimpl, hookspec
from bedplate.contract.manifest import (
    BackendManifest,
    DeviceFacts,
    ProbeRequest,
    ProbeResult,
    ReportItem,
)
from bedplate.contract.memory import (
    AllocatorRequest,
    AllocatorState,
    HostKVCopy,
    KVPool,
    KVPoolRequest,
    TokenToKVPoolAllocator,
)
from bedplate.contract.ops import OpProvider, OpRegistry, OpRequest
from bedplate.contract.runtime import ActivateRequest, DeviceRuntime, Event, MemoryStatus
from bedplate.contract.steps import StepStats
from bedplate.contract.version import API_VERSION, ApiRange

__all__ = [
    "API_VERSION",
    "PROJECT",
    "ActivateRequest",
    "AllocatorRequest",
    "AllocatorState",
    "ApiRange",
    "AttentionBackend",
    "AttentionBuild",
    "AttentionCallSpec",
    "AttentionProvider",
    "AttentionRequest",
    "BackendCapabilities",
    "BackendManifest",
    "BedplateHooks",
    "Candidate",
    "CompileRequest",
    "ConformanceProfile",
    "Decision",
    "DeviceFacts",
    "DeviceRuntime",
    "Event",
    "GraphCapabilities",
    "GraphRunnerRequest",
    "HostKVCopy",
    "KVPool",
    "KVPoolRequest",
    "KnownGap",
    "MemoryCapabilities",
    "MemoryStatus",
    "OpProvider",
    "OpRegistry",
    "OpRequest",
    "ProbeRequest",
    "ProbeResult",
    "ReportItem",
    "StepStats",
    "Support",
    "TokenToKVPoolAllocator",
    "WiderTolerance",
    "hookimpl",
    "hookspec",
]
