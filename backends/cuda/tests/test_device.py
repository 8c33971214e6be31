# SPDX-License-Identifier: Apache-2.0
"""The device itself: taking it, and graphs that replay what eager passes compute."""

from __future__ import annotations

import pytest
import torch
from kernels.tests.graphs_on_device import GraphsOnDevice

from bedplate.contract import ActivateRequest

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def runtime():
    from bedplate_cuda.runtime import CudaRuntime

    runtime = CudaRuntime(ActivateRequest())
    yield runtime
    runtime.shutdown()


@pytest.fixture(scope="module")
def kind():
    from bedplate_cuda.graph import CudaGraphRunner

    return CudaGraphRunner


def test_runtime(runtime):
    from bedplate_cuda.runtime import capabilities

    assert runtime.device == torch.device("cuda:0")
    assert 0 < runtime.memory().free_bytes <= runtime.memory().total_bytes
    host = runtime.empty_host(100)
    assert host.is_pinned()
    assert host.data_ptr() % 64 == 0
    runtime.record_event().synchronize()
    with runtime.inference_guard():
        assert not torch.is_grad_enabled()
    found = capabilities(runtime)
    assert found.arch == "sm_{}{}".format(*torch.cuda.get_device_capability())
    assert found.graph.supported


class TestGraphs(GraphsOnDevice):
    """With this backend's runner."""
