# SPDX-License-Identifier: Apache-2.0
"""What differs between AMD's architectures, as data; the kernels are compiled for these.

Looked up by the name of the architecture (``gcnArchName`` up to its first colon) and never by
compute capability: HIP reports 9.4 for gfx942, which would be read as a newer NVIDIA device.
Nothing heavy is imported, so that a probe can look here.
"""

from __future__ import annotations

__all__ = ["ARCHITECTURES", "Architecture", "arch_word", "find"]

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One architecture.

    Attributes:
        family: Folder of launch sizes that it shares with its relatives.
        wave: Threads of a wavefront.
        lds_bytes: Local memory ("LDS") that one program can have.
        direct_copies: Whether a compiler may copy from memory to LDS past the registers.
        slices: Dies with a cache of their own ("XCD"), in the largest product.
        fp8: Encoding of eight-bit floats that it converts in hardware: ``fnuz`` has no
            negative zero and no infinity, ``ocp`` is that of other vendors; empty if it
            converts none.
        products: What is sold with it.
    """

    family: Literal["cdna", "rdna"]
    wave: Literal[32, 64]
    lds_bytes: int = 64 << 10
    direct_copies: bool = False
    slices: int = 1
    fp8: Literal["", "fnuz", "ocp"] = ""
    products: str = ""

    @property
    def narrow(self) -> tuple[str, ...]:
        """Torch dtypes of eight bits that a cache may have."""
        return _NARROW[self.fp8]


_NARROW: dict[str, tuple[str, ...]] = {
    "": (),
    "fnuz": ("float8_e4m3fnuz", "float8_e5m2fnuz"),
    "ocp": ("float8_e4m3fn", "float8_e5m2"),
}

ARCHITECTURES = {
    "gfx90a": Architecture(family="cdna", wave=64, products="Instinct MI200"),
    "gfx942": Architecture(family="cdna", wave=64, slices=8, fp8="fnuz",
                           products="Instinct MI300"),
    "gfx950": Architecture(family="cdna", wave=64, lds_bytes=160 << 10, direct_copies=True,
                           slices=8, fp8="ocp", products="Instinct MI350"),
    "gfx1100": Architecture(family="rdna", wave=32, products="Radeon RX 7900, PRO W7900"),
    "gfx1201": Architecture(family="rdna", wave=32, fp8="ocp",
                            products="Radeon RX 9070, AI PRO R9700"),
}  # fmt: skip
"""Every architecture that all kernels are compiled for, by name."""


def arch_word(name: str) -> str:
    """``gfx942:sramecc+:xnack-`` without its features."""
    return name.partition(":")[0]


def find(name: str) -> Architecture | None:
    """What is known of an architecture; ``None`` of one that nothing is compiled for.

    Args:
        name: As the runtime or the driver gives it.
    """
    return ARCHITECTURES.get(arch_word(name))
