# SPDX-License-Identifier: Apache-2.0
"""What kernels may know of the device that runs them: declared data, never a vendor's name.

A backend makes one ``Features`` when it takes its device and hands it to everything here.
Extras that not every device has, such as chained launches, are functions inside it; kernels
receive them as constants, so one source compiles everywhere.
"""

from __future__ import annotations

__all__ = ["Chain", "Features", "neighbour", "nothing"]

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from bedplate.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Mapping


@triton.jit
def nothing():
    """What a kernel calls where the device has no such feature."""


@triton.jit
def neighbour(program, programs, SLICES: tl.constexpr):  # noqa: N803 - a constant
    """The place of a program where neighbours are to run on one slice of the device.

    Programs are dealt to slices in turn, so those of one slice are ``SLICES`` apart.  Spare
    ones at the end stay where they are.
    """
    if SLICES > 1:
        share = programs // SLICES
        moved = program % SLICES * share + program // SLICES
        program = tl.where(program < share * SLICES, moved, program)
    return program


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Chained launches: a kernel may begin while the one before it in the stream still runs.

    Every kernel launched with ``arguments()`` calls ``WAIT()`` before it reads or writes
    anything that another kernel touches, in every program and before any early return;
    constants such as weights may be read before.  ``RELEASE()``, its first statement, lets the
    next one begin.  One that begins early takes room on the cores from those still at work, so
    when it may is measured, like other launch sizes.

    Attributes:
        wait: Device function that returns once the kernels before have finished.
        release: Device function that lets the next kernel begin.
        wait_and_release: Device function that does both, one after the other.
        options: Launch options that turn the feature on.
    """

    wait: Any = nothing
    release: Any = nothing
    wait_and_release: Any = nothing
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def arguments(self, release: str = "begin") -> dict[str, Any]:
        """Keywords of a launch: the constants ``WAIT`` and ``RELEASE``, and the options.

        Args:
            release: When the next kernel may begin: once every program of this one has begun
                (``begin``), may read its input (``input``), or has ended (``end``).

        Raises:
            ContractError: There is no such moment.
        """
        moments = {
            "begin": (self.wait, self.release),
            "input": (self.wait_and_release, nothing),
            "end": (self.wait, nothing),
        }
        if release not in moments:
            raise ContractError(
                f"a kernel cannot release the next one at '{release}'; "
                f"known: {', '.join(moments)}"
            )
        wait, early = moments[release]
        return {"WAIT": wait, "RELEASE": early, **self.options}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """One device; equal to itself alone, so that choices for it are quickly found again.

    Attributes:
        arch: Architecture word; names a folder of ``configs``.
        device: The device's own name, for settings of that very device.
        family: Word for architectures that share settings; also a folder of ``configs``.
        cores: Multiprocessors.
        slices: Groups of cores that have a cache of their own; programs are dealt to them in
            turn.
        wave: Threads that run as one: a warp has so many.
        shared_bytes: Shared memory that one program can have.
        shared_operands: Whether matrix units read operands from shared memory, and not from
            registers.
        early_registers: Whether the first stage of a pipeline ends in registers, so that one
            of n stages holds n − 1 tiles in shared memory.
        narrow: Names of the torch dtypes of eight bits that it converts, for the cache.
        chain: Chained launches, if the device has them.
    """

    arch: str = ""
    device: str = ""
    family: str = ""
    cores: int = 64
    slices: int = 1
    wave: int = 32
    shared_bytes: int = 64 << 10
    shared_operands: bool = False
    early_registers: bool = False
    narrow: tuple[str, ...] = ()
    chain: Chain = field(default_factory=Chain)
