# SPDX-License-Identifier: Apache-2.0
"""What processor this is, and which cores a process should use.

Reads /proc and /sys only, so that probing stays light.  ``bind_cores`` is pure.
"""

from __future__ import annotations

__all__ = ["Host", "bind_cores", "parse_cores", "read"]

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bedplate.errors import ConfigError

_LEVELS = (
    ("x86_64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("x86_64-v3", {"avx2", "fma", "bmi2"}),
    ("x86_64-v2", {"sse4_2", "popcnt"}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The machine, as the operating system describes it.

    Attributes:
        model_name: As the vendor calls the processor.
        arch: Architecture word, such as ``x86_64-v4``.
        flags: Instruction sets.
        nodes: NUMA node → its physical cores (first thread of each), ascending.
        allowed: Cores that this process may use.
        memory_bytes: Main memory.
    """

    model_name: str
    arch: str
    flags: frozenset[str]
    nodes: tuple[tuple[int, ...], ...]
    allowed: frozenset[int]
    memory_bytes: int

    @property
    def has_bf16_matrix_unit(self) -> bool:
        """Whether bfloat16 products run on a matrix unit."""
        return "amx_bf16" in self.flags

    @property
    def has_bf16_dot(self) -> bool:
        """Whether bfloat16 dot products are native."""
        return "avx512_bf16" in self.flags or self.has_bf16_matrix_unit

    def facts(self) -> dict[str, str]:
        """For ``doctor``."""
        bf16 = (
            "matrix unit"
            if self.has_bf16_matrix_unit
            else "vector"
            if self.has_bf16_dot
            else "no"
        )
        return {
            "processor": self.model_name,
            "architecture": self.arch,
            "bfloat16": bf16,
            "physical cores by node": " | ".join(",".join(map(str, n)) for n in self.nodes),
            "cores allowed": ",".join(map(str, sorted(self.allowed))),
        }


@cache
def read() -> Host:
    """The machine we run on."""
    info = _cpuinfo()
    flags = frozenset((info.get("flags") or info.get("Features") or "").split())
    allowed = (
        frozenset(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else (frozenset(range(os.cpu_count() or 1)))
    )
    return Host(
        model_name=info.get("model name", os.uname().machine),
        arch=_arch(os.uname().machine, flags),
        flags=flags,
        nodes=_nodes() or (tuple(sorted(allowed)),),
        allowed=allowed,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def bind_cores(host: Host, setting: str, *, rank: int, world_size: int) -> tuple[int, ...]:
    """Cores that one rank's threads run on.

    Args:
        host: The machine.
        setting: ``all``: one NUMA node a rank, physical cores only, within the process's
            affinity; ``none``: empty, leave threads alone; else core lists separated by
            ``|``, one per rank, such as ``0-3|4-7``.
        rank: This rank.
        world_size: Number of ranks on this machine.

    Raises:
        ConfigError: More ranks than NUMA nodes, too few lists, or no core left.
    """
    if setting == "none":
        return ()
    if setting != "all":
        parts = setting.split("|")
        if rank >= len(parts):
            raise ConfigError(
                f"Thread binding {setting!r} names {len(parts)} ranks, rank {rank} is missing. "
                "Give one list per rank, separated by '|', or 'all'"
            )
        cores: tuple[int, ...] = parse_cores(parts[rank])
    elif world_size == 1:
        cores = tuple(core for node in host.nodes for core in node)
    elif world_size > len(host.nodes):
        raise ConfigError(
            f"{world_size} ranks cannot each have a NUMA node: this machine has "
            f"{len(host.nodes)}. Name the cores of each rank, such as '0-3|4-7'"
        )
    else:
        cores = host.nodes[rank]
    usable = tuple(core for core in cores if core in host.allowed)
    if not usable:
        raise ConfigError(
            f"No core is left for rank {rank}: wanted {cores}, the process may use "
            f"{sorted(host.allowed)}. Widen its affinity or change the thread binding"
        )
    return usable


def parse_cores(text: str) -> tuple[int, ...]:
    """``"0-2,5"`` → ``(0, 1, 2, 5)``."""
    cores: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.strip().isdigit() or (last and not last.strip().isdigit()):
            raise ConfigError(f"{part!r} is not a core or a range of cores, such as 0-3")
        cores.extend(range(int(first), int(last or first) + 1))
    return tuple(cores)


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    block = path.read_text().split("\n\n", maxsplit=1)[0]
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _arch(machine: str, flags: frozenset[str]) -> str:
    if machine != "x86_64":
        return machine
    return next((name for name, needed in _LEVELS if needed <= flags), "x86_64")


def _nodes() -> tuple[tuple[int, ...], ...]:
    folders = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
    nodes = (
        parse_cores(text) for f in folders if (text := (f / "cpulist").read_text().strip())
    )
    return tuple(cores for cores in (_physical(node) for node in nodes) if cores)


def _physical(cores: tuple[int, ...]) -> tuple[int, ...]:
    """The first hardware thread of each core."""
    kept = []
    for core in cores:
        siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        first = parse_cores(siblings.read_text().strip())[0] if siblings.exists() else core
        if first == core:
            kept.append(core)
    return tuple(kept)
