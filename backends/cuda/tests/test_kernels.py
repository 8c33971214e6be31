# SPDX-License-Identifier: Apache-2.0
"""On a device: every case of the kernels, with the sizes and features it is served with."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="missing capability: triton is not installed")

from kernels.tests.on_device import CASES, check, make_ready

from bedplate_cuda.ops import device_features

pytestmark = pytest.mark.accelerator


@pytest.fixture(scope="module")
def features():
    return make_ready(device_features())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_equals_plain_torch(case, features):
    check(case, features)
