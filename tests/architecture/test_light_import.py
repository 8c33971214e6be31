# SPDX-License-Identifier: Apache-2.0
"""What must start fast stays light: ``import bedplate``, the contract, every ``plugin.py``."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
from tests.architecture.tree import BACKENDS, PLUGINS, folders

HEAVY = ("torch", "transformers", "numpy", "triton", "torch_npu")
LIGHT = ["bedplate", "bedplate.contract", "bedplate.cli.main", *(
    f"bedplate_{folder.name}.plugin" for folder in folders(BACKENDS) + folders(PLUGINS)
)]  # fmt: skip
HELP_CPU_S = 0.150
SLACK = 2
"""CPU seconds, not wall seconds, so neighbours hardly matter; a slow or throttled processor
still does. A real regression (one import of torch) costs ten times the limit."""


def run(*arguments: str) -> str:
    paths = os.pathsep.join(str(folder) for folder in folders(PLUGINS))
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | {"PYTHONPATH": paths},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def cpu_seconds_of_help() -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = run("-c", "from bedplate.cli.main import main; main()", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "generate" in text
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("module", LIGHT)
def test_importing_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*(m for m in {HEAVY} if m in sys.modules))"
    assert run("-c", code).split() == []


def test_help_needs_little_processor_time():
    assert min(cpu_seconds_of_help() for _ in range(3)) < HELP_CPU_S * SLACK
