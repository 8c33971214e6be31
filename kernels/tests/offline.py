# SPDX-License-Identifier: Apache-2.0
"""Compile what launches would compile for an architecture, without a device.

Run in a process of its own, since a module imported for the interpreter cannot be compiled:
``python offline.py ARCH MODULE CODE`` executes ``CODE`` with the names of ``MODULE``, and
``python offline.py ARCH`` runs every case of ``bedplate_triton.cases``; both on ``meta``
tensors.  Each distinct launch is compiled as it stands instead of run, and printed as one
JSON object.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
"""What one program may have; the compiler does not check it without a device."""


def compile_launches(module: str, code: str, arch: str = "sm_90") -> list[dict]:
    """Facts of every launch that ``code`` makes: see ``_facts``."""
    return _compile(arch, module, code)


def compile_cases(arch: str) -> list[dict]:
    """Facts of every distinct launch of all cases; ``case`` names the first that made it."""
    return _compile(arch)


def _compile(*arguments: str) -> list[dict]:
    return run_offline(__file__, *arguments)


def run_offline(*arguments: str, **environment: str) -> list[dict]:
    """Run Python without the interpreter of kernels; the JSON objects that it prints."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = inherited | environment
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if "no offline compiler" in run.stderr:
        pytest.skip(f"missing capability: {run.stderr.strip().splitlines()[-1]}")
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


class _Offline:
    """A driver that knows its target and no device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, _device):
        return 0


class _Compiler:
    """Takes the place of every launch."""

    def __init__(self, run) -> None:
        self.run, self.seen, self.case = run, set(), ""

    def launch(self, kernel, *args, grid, warmup, **options):
        compiled = self.run(kernel, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in self.seen or not self.case:
            self.seen.add(compiled.hash)
            print(json.dumps(_facts(compiled) | {"case": self.case}))


def _facts(compiled) -> dict:
    """Name, shared bytes, stack bytes a thread (more than none are spills), assembly.

    ``compile`` is the same for launches of which the second compiles nothing.
    """
    return {
        "compile": compiled.hash,
        "kernel": compiled.metadata.name,
        "shared": compiled.metadata.shared,
        "stack": _stack_bytes(compiled.asm["cubin"]),
        "assembly": compiled.asm["ptx"],
    }


def _stack_bytes(binary: bytes) -> int:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"STACK:(\d+)", usage)))


def _run_cases(compiler: _Compiler, arch: str) -> None:
    import torch

    from bedplate_triton.cases import all_cases
    from bedplate_triton.features import Features

    features = Features(arch=arch, cores=132, shared_bytes=SHARED_BYTES[arch])
    for case in all_cases():
        compiler.case = case.label
        try:
            case.run(case.make(torch.device("meta"), 0), features)
        except Exception as error:
            error.add_note(f"in the case {case.label}")
            raise


def use_offline_driver(arch: str) -> None:
    """Compile for an architecture from now on, in this process."""
    import triton

    if "nvidia" not in triton.backends.backends:
        sys.exit(f"no offline compiler for {arch} in triton {triton.__version__}")
    triton.runtime.driver.set_active(_Offline(int(arch.removeprefix("sm_"))))


def _main(arch: str, module: str = "", code: str = "") -> None:
    import triton

    use_offline_driver(arch)
    compiler = _Compiler(triton.runtime.JITFunction.run)
    triton.runtime.JITFunction.run = lambda *args, **options: compiler.launch(*args, **options)
    with contextlib.suppress(BrokenPipeError):
        if module:
            exec(code, vars(importlib.import_module(module)))
        else:
            _run_cases(compiler, arch)


if __name__ == "__main__":
    _main(*sys.argv[1:])
