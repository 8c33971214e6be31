# SPDX-License-Identifier: Apache-2.0
"""A simulated device for the tests, and nothing of Triton where it is not installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

HEAVY = [
    "test_attention.py", "test_aiter.py", "test_device.py", "test_graph.py", "test_runtime.py",
]  # fmt: skip
collect_ignore = [] if importlib.util.find_spec("triton") else HEAVY


@pytest.fixture
def hip(monkeypatch):
    """``torch.cuda`` answers as torch for ROCm does."""
    if torch.accelerator.is_available():
        pytest.skip("missing capability: a machine without a device, for a pretended one")
    from backends.rocm.tests.hip import HipSurface

    return HipSurface(monkeypatch)
