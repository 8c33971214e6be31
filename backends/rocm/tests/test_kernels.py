# SPDX-License-Identifier: Apache-2.0
"""On a device: every case of the kernels, with the sizes and features it is served with."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="missing capability: triton is not installed")

from bedplate_rocm.ops import device_features
from bedplate_triton.ahead import compile_ahead
from bedplate_triton.cases import all_cases, relative_error

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(torch.version.hip is None, reason="missing capability: torch for ROCm"),
]

CASES = all_cases()
DEVICE = torch.device("cuda")


@pytest.fixture(scope="module")
def features():
    """Of the device; all kernels are compiled at once, by all cores."""
    found = device_features()
    with compile_ahead():
        for case in CASES:
            if case.runs_on(found):
                case.run(case.make(DEVICE, 0), found)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_equals_plain_torch(case, features):
    if not case.runs_on(features):
        pytest.skip(f"missing capability: the device does not convert {case.converts}")
    want = case.reference(case.make(DEVICE, 0))
    got = case.run(case.make(DEVICE, 0), features)
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) <= case.tolerance
