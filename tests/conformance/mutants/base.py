# SPDX-License-Identifier: Apache-2.0
"""What mutants are made of: a sound backend on the host, any part of which may be replaced.

The sound one is the CPU backend with tapes for graphs, so that recorded passes have a device's
semantics and take no compiler.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bedplate.contract import (
    AttentionProvider,
    BackendCapabilities,
    BackendManifest,
    ConformanceProfile,
    OpProvider,
    ReportItem,
    Support,
    WiderTolerance,
    hookimpl,
)
from bedplate.testing.graphs import RerunGraphRunner, TapeGraphRunner
from bedplate.testing.tiny_decoder import TinyAttention
from bedplate_cpu.attention import NativeAttention, providers
from bedplate_cpu.plugin import CpuBackend
from bedplate_cpu.runtime import CpuRuntime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

NAME = "mutant"
SLOW_TAPE = WiderTolerance(
    checks="L7/replay", factor=10.0, reason="a tape is played by Python, call by call"
)


PROFILE = ConformanceProfile(tolerances=(SLOW_TAPE,))


def sound_graphs(request):
    """Tapes; whole models run again instead, because no tape can hold attention in C."""
    small = isinstance(request.attention, TinyAttention)
    return (TapeGraphRunner if small else RerunGraphRunner)(request)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What of the sound backend is replaced.

    ``capabilities`` changes the record it is given; ``ops`` are calls or whole providers by
    operation; ``attention`` is a class, ``supports`` and ``determinism`` what it says.
    """

    manifest: Mapping[str, Any] = field(default_factory=dict)
    runtime: type[CpuRuntime] = CpuRuntime
    capabilities: Callable[[BackendCapabilities], BackendCapabilities] = lambda c: c
    ops: Mapping[str, Any] = field(default_factory=dict)
    attention: type[NativeAttention] | None = None
    supports: Callable[[Any], Support] | None = None
    determinism: str = "run_to_run"
    pool: Callable[[Any], Any] = lambda _request: None
    allocator: Callable[[Any], Any] = lambda _request: None
    graphs: Callable[[Any], Any] = sound_graphs
    probe: Callable[[Any], Any] = lambda answer: answer
    report: tuple[Any, ...] = (ReportItem(name="mutant", value="yes"),)
    explain: Callable[[BaseException], Any] = lambda _error: None
    profile: Any = PROFILE
    after_load: Callable[[Any], None] = lambda _model: None


class MutantBackend(CpuBackend):
    """The CPU backend with other parts."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    @hookimpl
    def bedplate_manifest(self):
        facts = {"summary": "a mutant", "remedy": "`pip uninstall`", "docs": "docs"}
        return BackendManifest(name=NAME, **(facts | self.parts.manifest))

    @hookimpl
    def bedplate_probe(self, request):
        return self.parts.probe(super().bedplate_probe(request))

    @hookimpl
    def bedplate_environment_report(self):
        return list(self.parts.report)

    @hookimpl
    def bedplate_activate(self, request):
        return self.parts.runtime(request)

    @hookimpl
    def bedplate_capabilities(self, runtime):
        have = super().bedplate_capabilities(runtime)
        graph = replace(have.graph, default=True, reason="")
        have = replace(have, compute_dtypes=("float32", "bfloat16", "float16"), graph=graph)
        return self.parts.capabilities(have)

    @hookimpl
    def bedplate_register_ops(self, registry):
        for op, made in self.parts.ops.items():
            facts = made if isinstance(made, dict) else {"call": made}
            registry.register(OpProvider(op=op, provider=NAME, **facts))

    @hookimpl
    def bedplate_register_attention(self, register):
        parts, sound = self.parts, providers()[0]
        register(
            AttentionProvider(
                name="native",
                provider=NAME,
                priority=110,
                supports=parts.supports or sound.supports,
                build=parts.attention or NativeAttention,
                determinism=parts.determinism,
            )
        )

    @hookimpl
    def bedplate_make_kv_pool(self, request):
        return self.parts.pool(request)

    @hookimpl
    def bedplate_make_allocator(self, request):
        return self.parts.allocator(request)

    @hookimpl
    def bedplate_make_graph_runner(self, request):
        return self.parts.graphs(request)

    @hookimpl
    def bedplate_explain_error(self, error):
        return self.parts.explain(error)

    @hookimpl
    def bedplate_conformance_profile(self):
        return self.parts.profile

    @hookimpl
    def bedplate_after_load(self, model):
        self.parts.after_load(model)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One mistake.

    ``level`` is where it must be found at the latest; ``only`` narrows what is run, where a
    level takes long.
    """

    level: int
    what: str
    parts: Parts
    only: str = "*"


def mutant(level: int, what: str, only: str = "*", **parts: Any) -> Mutant:
    if only == "*" and level == 2:  # other operations are sound
        (op,) = parts["ops"]
        only = f"L2/{op}/{NAME}/*"
    return Mutant(level=level, what=what, only=only, parts=Parts(**parts))
