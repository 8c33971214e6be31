# SPDX-License-Identifier: Apache-2.0
"""The device, taken once."""

from __future__ import annotations

import os

import pytest

from bedplate.contract import ActivateRequest


@pytest.fixture(scope="session")
def runtime():
    from bedplate_npu.runtime import NpuRuntime

    taken = NpuRuntime(ActivateRequest(environment=dict(os.environ)))
    with taken.inference_guard():
        yield taken
    taken.shutdown()
