# SPDX-License-Identifier: Apache-2.0
"""The device, taken once."""

from __future__ import annotations

import gc
import os

import pytest

from bedplate.contract import ActivateRequest


@pytest.fixture(scope="session")
def runtime():
    from bedplate_npu.runtime import NpuRuntime

    gc.freeze()  # a capture collects garbage first, and most of what it would look at stays
    taken = NpuRuntime(ActivateRequest(environment=dict(os.environ)))
    with taken.inference_guard():
        yield taken
    taken.shutdown()
