# SPDX-License-Identifier: Apache-2.0
"""What tests ask of ``kernels.matrix.offline``: kernels compiled without a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


def compile_launches(module: str, code: str, arch: str = "sm_90") -> list[dict]:
    """Facts of every launch that ``code`` makes with the names of ``module``."""
    return _offline(arch, "--module", module, "--code", code)


def compile_cases(arch: str, modules: list[str]) -> list[dict]:
    """Facts of every distinct launch of some modules of ``bedplate_triton.cases``."""
    return _offline(arch, "--cases", *modules) if modules else []


def _offline(*arguments: str) -> list[dict]:
    return run_offline("-m", "kernels.matrix.offline", *arguments)


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
