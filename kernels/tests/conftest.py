# SPDX-License-Identifier: Apache-2.0
"""Kernels run on the accelerator where there is one, and in Triton's interpreter elsewhere.

The interpreter must be chosen before triton is imported, hence here.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path

    from bedplate_triton.features import Chain

if not torch.accelerator.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        from kernels.tests.interpreter import install

        install()


class _WithoutTriton(pytest.Module):
    """Stands for a test module that cannot even be imported."""

    def collect(self):
        pytest.skip("missing capability: triton is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent):
    if importlib.util.find_spec("triton") is None:
        return _WithoutTriton.from_parent(parent, path=module_path)
    return None


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the accelerator, or the host with the interpreter."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@pytest.fixture
def counted() -> tuple[Chain, list[str]]:
    """A chain, and what kernels launched with it have called so far, program by program."""
    if torch.accelerator.is_available():
        pytest.skip("missing capability: a device counts no calls, Triton's interpreter does")
    from bedplate_triton.features import Chain

    calls: list[str] = []
    chain = Chain(
        wait=lambda: calls.append("wait"),
        release=lambda: calls.append("release"),
        wait_and_release=lambda: calls.append("wait and release"),
    )
    return chain, calls
