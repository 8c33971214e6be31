# SPDX-License-Identifier: Apache-2.0
"""The device itself: taking it, and graphs that replay what eager passes compute."""

from __future__ import annotations

import pytest
import torch
from kernels.tests.graphs_on_device import GraphsOnDevice

from bedplate.contract import ActivateRequest
from bedplate_rocm.architectures import arch_word

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(torch.version.hip is None, reason="missing capability: torch for ROCm"),
]


@pytest.fixture(scope="module")
def runtime():
    from bedplate_rocm.runtime import HipRuntime

    runtime = HipRuntime(ActivateRequest())
    yield runtime
    runtime.shutdown()


@pytest.fixture(scope="module")
def kind():
    from bedplate_rocm.graph import HipGraphRunner

    return HipGraphRunner


def test_runtime(runtime):
    from bedplate_rocm.runtime import capabilities

    assert 0 < runtime.memory().free_bytes <= runtime.memory().total_bytes
    assert runtime.empty_host(100).is_pinned()
    runtime.record_event().synchronize()
    with runtime.inference_guard():
        assert not torch.is_grad_enabled()
    found = capabilities(runtime)
    assert found.arch == arch_word(torch.cuda.get_device_properties(0).gcnArchName)
    assert found.graph.supported


def test_kernels_are_told_the_wave_of_the_device(runtime):
    from bedplate_rocm.ops import device_features

    assert device_features().wave == torch.cuda.get_device_properties(0).warp_size


class TestGraphs(GraphsOnDevice):
    """With this backend's runner."""
