# SPDX-License-Identifier: Apache-2.0
"""What a compiled launch may take: limits of the device, and the few allowances there are."""

from __future__ import annotations

__all__ = ["problems"]

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kernels.matrix.targets import TARGETS, Target

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_MULTIPLIES = ("_split_kernel", "_extend_kernel", "_skinny", "_multiply")
"""Kernels whose inputs of sixteen bits must reach the matrix units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Allowance:
    """Bytes that a thread may spill.

    Attributes:
        kernel: Name of the kernel.
        stack: The most.
        why: The reason.
        case: Part of the case's name; every case if empty.
        archs: Architectures; all if empty.
        tritons: Versions of Triton; all if empty.
    """

    kernel: str
    stack: int
    why: str
    case: str = ""
    archs: tuple[str, ...] = ()
    tritons: tuple[str, ...] = ()


_ALLOWANCES = (
    _Allowance(
        kernel="_extend_kernel", stack=512,
        why="prompts are limited by arithmetic, and a little of it waits for memory unnoticed",
    ),
    *(
        _Allowance(
            kernel=kernel, stack=2048, case="latent 128 of 576", archs=("gfx1100", "gfx1201"),
            why="576 columns of queries and 512 of sums are more than its registers hold",
        )
        for kernel in ("_split_kernel", "_extend_kernel")
    ),
    _Allowance(
        kernel="_extend_kernel", stack=2304, case="latent 128 of 576", archs=("gfx1100",),
        tritons=("3.9.0",),
        why="the same; 3.9.0 spills 2,144 to 3,068 bytes whichever of nine sizes it is given",
    ),
    _Allowance(
        kernel="_split_kernel", stack=304, case="latent 128 of 576", archs=("sm_90",),
        tritons=("3.9.0",),
        why="3.6.0 and 3.7.1 hold all of these measured sizes in 255 registers, 3.9.0 not "
        "quite; it reads some 40 numbers a tile again, from the nearest cache",
    ),
)  # fmt: skip

_AT_A_STEP = 32
"""Bytes that a compiler may spill where one register more would cost a warp of a scheduler: it
does so by itself, from Triton 3.9.0 on."""

_EXPECTED = (
    ("sm_90", "_extend_kernel", "prompt of 4096", "wgmma"),
    ("sm_90", "_multiply", "4096", "wgmma"),
    ("sm_100", "_extend_kernel", "prompt of 4096", "tcgen05"),
)
"""Architecture, kernel, part of the case, and the instruction that large tiles must use."""


def problems(arch: str, facts: Mapping[str, Any], triton: str) -> Iterator[str]:
    """Why a launch is over budget, one sentence each; none if it is not.

    Args:
        arch: What it was compiled for.
        facts: Of one launch, as ``kernels.matrix.offline`` prints them.
        triton: Version of the Triton that compiled it.
    """
    target = TARGETS[arch]
    kernel, case = facts["kernel"], facts["case"]
    what = f"{arch}, {kernel} of {case}:"
    if facts["shared"] > target.program_bytes:
        yield f"{what} {facts['shared']:,} bytes shared of {target.program_bytes:,}"
    if facts["warps"] * target.wave > 1024:
        yield f"{what} {facts['warps']} warps of {target.wave} threads"
    most = _most_stack(target, facts, triton)
    if facts["stack"] > most:
        yield f"{what} {facts['stack']:,} bytes spilled, allowed are {most:,}"
    if facts["occupancy"] < 1:
        yield f"{what} not one program fits a core"
    if facts["narrow"] and kernel in _MULTIPLIES and not facts["matrix"]:
        yield f"{what} no matrix instruction"
    for place, name, part, instruction in _EXPECTED:
        used = any(found.startswith(instruction) for found in facts["matrix"])
        if (place, name) == (arch, kernel) and part in case and not used:
            yield f"{what} {instruction} expected, found {facts['matrix'] or 'nothing'}"
    if facts["estimate"] is not None and facts["estimate"] < facts["shared"]:
        yield (
            f"{what} {facts['shared']:,} bytes shared, and the validator reckons with "
            f"{facts['estimate']:,}; see bedplate_triton/fit.py"
        )


def _most_stack(target: Target, facts: Mapping[str, Any], triton: str) -> int:
    arch = target.arch
    fitting = [
        a.stack for a in _ALLOWANCES
        if a.kernel == facts["kernel"] and a.case in facts["case"]
        and arch in (a.archs or (arch,)) and triton in (a.tritons or (triton,))
    ]  # fmt: skip
    with_one_more = target.occupancy(
        registers=facts["registers"] + 1, shared=facts["shared"], warps=facts["warps"]
    )
    if target.backend == "cuda" and with_one_more < facts["occupancy"]:
        fitting.append(_AT_A_STEP)
    return max(fitting, default=0)
