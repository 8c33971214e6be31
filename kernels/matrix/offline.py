# SPDX-License-Identifier: Apache-2.0
"""Compile what launches would compile for an architecture, without a device.

Run in a process of its own, since a module imported for the interpreter cannot be compiled:
``python -m kernels.matrix.offline ARCH --module MODULE --code CODE`` executes ``CODE`` with
the names of ``MODULE``, and ``python -m kernels.matrix.offline ARCH --cases MODULE …`` runs
the cases of modules of ``bedplate_triton.cases``; both on ``meta`` tensors.  Each distinct
launch is compiled as it stands instead of run, and printed as one JSON object.
"""

from __future__ import annotations

__all__ = ["use_offline_driver"]

import argparse
import contextlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.matrix.targets import Target, compiler, find

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


_JUDGED = {
    "_split_kernel": "decode_attention",
    "_extend_kernel": "extend_attention",
    "_multiply": "invariant",
}
"""Kernels whose shared memory is estimated, and the operations that choose their sizes."""


class _Driver:
    """Knows what it compiles for, and no device."""

    def __init__(self, backend: str, arch: int | str, wave: int) -> None:
        self.backend, self.arch, self.wave = backend, arch, wave

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.wave)

    def get_current_device(self) -> int | str:
        return self.arch

    def get_current_stream(self, _device: Any) -> int:
        return 0


def use_offline_driver(arch: str, wave: int = 32) -> None:
    """Compile for an architecture from now on, in this process.

    Args:
        arch: Architecture word, which need not be one of ``TARGETS``.
        wave: Threads of a warp.
    """
    import triton

    backend, name = compiler(arch)
    if {"cuda": "nvidia", "hip": "amd"}[backend] not in triton.backends.backends:
        sys.exit(f"no offline compiler for {arch} in triton {triton.__version__}")
    triton.runtime.driver.set_active(_Driver(backend, name, wave))


class _Compiler:
    """Takes the place of every launch."""

    def __init__(self, target: Target, run: Callable[..., Any], assembly: bool) -> None:
        self.target, self.run, self.assembly = target, run, assembly
        self.seen: set[str] = set()
        self.module = self.case = ""
        self.estimates: dict[str, int] = {}

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = self.run(kernel, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in self.seen or not self.case:
            self.seen.add(compiled.hash)
            facts = _facts(compiled, self.target, self.assembly)
            facts |= {"module": self.module, "case": self.case}
            print(json.dumps(facts | {"estimate": self._estimate(facts)}))

    def _estimate(self, facts: dict[str, Any]) -> int | None:
        """Shared bytes that the validator reckons with, for kernels that it judges."""
        return self.estimates.get(_JUDGED.get(facts["kernel"], ""))

    def watch_choices(self) -> None:
        """Note what the validator says of each choice of sizes."""
        from bedplate_triton import configs, fit

        choose = configs.choose

        def watched(op: str, features: Any, **key: Any) -> Any:
            sizes = choose(op, features, **key)
            _least, self.estimates[op] = fit.shared_bytes(op, sizes, key, features)
            return sizes

        configs.choose = watched


def _facts(compiled: Any, target: Target, assembly: bool) -> dict[str, Any]:
    """What the compiler made.

    ``compile`` is the same for launches of which the second compiles nothing, ``stack`` are
    bytes of memory that a thread uses for want of registers, ``occupancy`` are warps that a
    scheduler can hold.
    """
    metadata = compiled.metadata
    text = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    resources = _cuda_resources if target.backend == "cuda" else _hip_resources
    registers, stack = resources(compiled)
    found = {
        "compile": compiled.hash,
        "kernel": metadata.name,
        "narrow": _is_narrow(compiled),
        "warps": metadata.num_warps,
        "shared": metadata.shared,
        "registers": registers,
        "stack": stack,
        "occupancy": target.occupancy(
            registers=registers, shared=metadata.shared, warps=metadata.num_warps
        ),
        "matrix": target.instructions(text),
    }
    return found | ({"assembly": text} if assembly else {})


def _is_narrow(compiled: Any) -> bool:
    """Whether the first tensor has sixteen bits an element, which matrix units multiply."""
    return next(iter(compiled.src.signature.values())) in ("*bf16", "*fp16")


def _cuda_resources(compiled: Any) -> tuple[int, int]:
    """Registers and stack bytes of a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _sum(r"REG:(\d+)", usage), _sum(r"STACK:(\d+)", usage)


def _hip_resources(compiled: Any) -> tuple[int, int]:
    """Vector registers and scratch bytes of a thread; scalar registers are never scarce."""
    text = compiled.asm["amdgcn"]
    return (
        _sum(r"\.vgpr_count:\s+(\d+)", text),
        _sum(r"\.private_segment_fixed_size:\s+(\d+)", text),
    )


def _sum(pattern: str, text: str) -> int:
    return sum(map(int, re.findall(pattern, text)))


def _run_cases(compiler: _Compiler, modules: Sequence[str]) -> None:
    import torch

    features = compiler.target.features()
    compiler.watch_choices()
    for compiler.module in modules:
        cases = importlib.import_module(f"bedplate_triton.cases.{compiler.module}").CASES
        for case in (case for case in cases if case.runs_on(features)):
            compiler.case = case.label
            try:
                case.run(case.make(torch.device("meta"), 0), features)
            except Exception as error:
                error.add_note(f"in the case {case.label}")
                raise


def _main() -> None:
    import triton

    parser = argparse.ArgumentParser()
    parser.add_argument("arch")
    parser.add_argument("--module", default="")
    parser.add_argument("--code", default="")
    parser.add_argument("--cases", nargs="*", default=())
    given = parser.parse_args()
    target = find(given.arch)
    use_offline_driver(target.arch, target.wave)
    compiler = _Compiler(target, triton.runtime.JITFunction.run, bool(given.module))
    triton.runtime.JITFunction.run = lambda *args, **options: compiler.launch(*args, **options)
    with contextlib.suppress(BrokenPipeError):
        if given.module:
            exec(given.code, vars(importlib.import_module(given.module)))
        else:
            _run_cases(compiler, given.cases)


if __name__ == "__main__":
    _main()
