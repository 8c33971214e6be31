# SPDX-License-Identifier: Apache-2.0
"""Compile what a module's launches would compile for sm_90, without a device.

Run as ``python offline.py MODULE CODE``: in a process of its own, since a module imported for
the interpreter cannot be compiled. ``CODE`` calls the module's functions on ``meta`` tensors;
each launch is compiled as it stands instead of run. Prints one JSON object a launch.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TARGET = ("cuda", 90, 32)


def compile_launches(module: str, code: str) -> list[dict]:
    """Shared and stack bytes and assembly of every launch that ``code`` makes."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, __file__, module, code]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if "no offline compiler" in run.stderr:
        pytest.skip(f"missing capability: {run.stderr.strip().splitlines()[-1]}")
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


class _Offline:
    """A driver that knows its target and no device."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGET)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0


class _Compiled:
    """Stands for a kernel: a launch compiles and prints."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            compiled = self.kernel.warmup(*args, grid=grid, **options)
            facts = {"shared": compiled.metadata.shared, "assembly": compiled.asm["ptx"]}
            print(json.dumps(facts | {"stack": _stack_bytes(compiled.asm["cubin"])}))

        return launch


def _stack_bytes(binary: bytes) -> int:
    """Bytes of local memory a thread; more than none are spilled registers."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"STACK:(\d+)", usage)))


def _main(name: str, code: str) -> None:
    import triton

    if "nvidia" not in triton.backends.backends:
        sys.exit(f"no offline compiler for {TARGET[0]} in triton {triton.__version__}")
    triton.runtime.driver.set_active(_Offline())
    module = importlib.import_module(name)
    for attribute, value in list(vars(module).items()):
        if isinstance(value, triton.runtime.JITFunction):
            setattr(module, attribute, _Compiled(value))
    exec(code, vars(module))


if __name__ == "__main__":
    _main(*sys.argv[1:])
