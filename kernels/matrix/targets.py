# SPDX-License-Identifier: Apache-2.0
"""What is compiled for: the architectures, their limits, and what their compilers tell."""

from __future__ import annotations

__all__ = ["TARGETS", "Target", "compiler", "find"]

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bedplate_rocm.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from bedplate_triton.features import Features

_SCHEDULERS = 4
"""Of a core, on every architecture here."""


def compiler(arch: str) -> tuple[str, int | str]:
    """Triton's words for a compiler and for an architecture, any that it knows."""
    if arch.startswith("sm_"):
        return "cuda", int(arch.removeprefix("sm_"))
    return "hip", arch


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One architecture.

    Attributes:
        backend: Triton's word for the compiler.
        arch: Architecture word.
        wave: Threads of a warp.
        cores: Of a product; sizes grids only.
        program_bytes: Shared memory that one program can have; compilers do not check it.
        core_bytes: Shared memory of a core, for all its programs.
        registers: Of 32 bits, of all threads of a scheduler.
        granule: Registers of a thread come in multiples of this.
        waves: Most warps of a scheduler.
        matrix: What the assembly calls its instructions for matrix products.
    """

    backend: str
    arch: str
    wave: int
    cores: int
    program_bytes: int
    core_bytes: int
    registers: int
    granule: int
    waves: int
    matrix: str

    def features(self) -> Features:
        """What the backend of such a device tells the kernels."""
        if self.backend == "hip":
            from bedplate_rocm.ops import features_of

            return features_of(self.arch, cores=self.cores)
        from bedplate_cuda.ops import with_chain
        from bedplate_triton.features import Features

        narrow = ("float8_e5m2",) if self.arch == "sm_80" else ("float8_e5m2", "float8_e4m3fn")
        return with_chain(
            Features(
                arch=self.arch,
                cores=self.cores,
                shared_bytes=self.program_bytes,
                shared_operands=self.arch in ("sm_90", "sm_100"),
                narrow=narrow,
            )
        )

    def occupancy(self, *, registers: int, shared: int, warps: int) -> int:
        """Warps that a scheduler can hold at a time; 0 if not one program fits.

        Args:
            registers: Of a thread.
            shared: Bytes of a program.
            warps: Of a program.
        """
        a_thread = -(-max(registers, 1) // self.granule) * self.granule
        by_registers = min(self.waves, self.registers // (a_thread * self.wave))
        if not shared:
            return by_registers
        programs = self.core_bytes // shared
        return min(by_registers, -(-programs * warps // _SCHEDULERS))

    def instructions(self, assembly: str) -> list[str]:
        """Names of the instructions for matrix products that an assembly has."""
        return sorted(set(re.findall(self.matrix, assembly)))


_MMA = r"\b(?:wgmma|tcgen05|mma)(?=\.(?:mma_async|mma|sync))"


def _sm(arch: str, program_kib: int, core_kib: int, cores: int, waves: int = 16) -> Target:
    return Target(
        backend="cuda", arch=arch, wave=32, cores=cores, program_bytes=program_kib << 10,
        core_bytes=core_kib << 10, registers=16 << 10, granule=8, waves=waves, matrix=_MMA,
    )  # fmt: skip


def _gfx(arch: str, cores: int, registers: int, granule: int, waves: int) -> Target:
    found = ARCHITECTURES[arch]
    # Of RDNA two compute units work as one core, with the local memory of both.
    core_bytes = found.lds_bytes * (2 if found.family == "rdna" else 1)
    return Target(
        backend="hip", arch=arch, wave=found.wave, cores=cores, program_bytes=found.lds_bytes,
        core_bytes=core_bytes, registers=registers * found.wave, granule=granule, waves=waves,
        matrix=r"\bv_(?:mfma|smfmac|wmma)_\w+",
    )  # fmt: skip


TARGETS = {
    target.arch: target
    for target in (
        _sm("sm_80", 163, 164, 108),
        _sm("sm_90", 227, 228, 132),
        _sm("sm_100", 227, 228, 148),
        _sm("sm_120", 99, 100, 170, waves=12),
        _gfx("gfx90a", 104, 512, 8, 8),
        _gfx("gfx942", 304, 512, 8, 8),
        _gfx("gfx950", 256, 512, 8, 8),
        _gfx("gfx1100", 48, 1536, 24, 16),
        _gfx("gfx1201", 32, 1536, 24, 16),
    )
}
"""By name."""


def find(arch: str) -> Target:
    """The target of a name; an error names those there are."""
    if arch not in TARGETS:
        raise SystemExit(f"No target {arch}; there are {', '.join(TARGETS)}.")
    return TARGETS[arch]
