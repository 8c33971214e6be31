# SPDX-License-Identifier: Apache-2.0
"""What only the simulated runtime can show: limits, error codes, refused devices.

Runs on it alone: each of these would take a device of that kind, or fill one.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from bedplate.contract import ActivateRequest
from bedplate.errors import BackendUnavailableError

pytestmark = pytest.mark.npu_silicon


def test_memory_has_a_limit_and_its_error_is_explained(runtime):
    from bedplate_npu.plugin import backend

    status = runtime.memory()
    assert 0 < status.free_bytes <= status.total_bytes
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(status.total_bytes, dtype=torch.uint8, device=runtime.device)
    assert "--mem-fraction" in backend.bedplate_explain_error(caught.value)


def test_fresh_memory_is_not_zero(runtime):
    runtime.empty_cache()
    fresh = torch.empty(1 << 26, dtype=torch.float32, device=runtime.device)
    assert fresh[-1000:].cpu().isnan().all()


def test_a_device_of_another_number_is_refused(runtime):
    from bedplate_npu.runtime import NpuRuntime

    with pytest.raises(BackendUnavailableError, match="There are 1 devices") as caught:
        NpuRuntime(ActivateRequest(device_index=3, environment=dict(os.environ)))
    assert caught.value.code == "HW010"


TAKE = """
import os
from backends.npu.tests.simulated.runtime import plugin
from bedplate.contract import ActivateRequest
from bedplate.errors import BackendUnavailableError
from bedplate_npu.runtime import NpuRuntime
try:
    taken = NpuRuntime(ActivateRequest(environment=dict(os.environ)))
    print("taken", taken.family, taken.max_graphs)
except BackendUnavailableError as error:
    print(error)
"""


def taken(**variables):
    done = subprocess.run(
        [sys.executable, "-c", TAKE], env=os.environ | variables, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"SIM_SOC": "Ascend310P3"}, ["310p", "no fused-infer attention", "HW012"]),
        ({"SIM_SOC": "Ascend910A"}, ["910a", "bfloat16", "HW012"]),
        ({"SIM_SOC": "Ascend950PR_9599"}, ["taken 950 4"]),
        ({"SIM_DEVICES": "0"}, ["sees no device", "npu-smi", "HW010"]),
    ],
)
def test_devices_are_refused_by_name(runtime, variables, parts):
    said = taken(**variables)
    assert all(part in said for part in parts), said


def test_streams_run_out_for_real(runtime):
    from backends.npu.tests.suite.scenario import Scenario

    scenario = Scenario(runtime)
    runner = scenario.make_runner(sizes=(1, 2, 4))
    os.environ["SIM_MAX_GRAPHS"] = "1"
    try:
        runner.capture()
    finally:
        del os.environ["SIM_MAX_GRAPHS"]
    reasons = [decision.candidates[0].reason for decision in scenario.decisions]
    assert "207008" in reasons[0] or "stream resource" in reasons[0]
    assert "no stream left; this one was not tried" in reasons[-1]
