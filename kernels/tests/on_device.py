# SPDX-License-Identifier: Apache-2.0
"""What every backend with these kernels does with the cases on its device."""

from __future__ import annotations

import pytest
import torch

from bedplate_triton.ahead import compile_ahead
from bedplate_triton.cases import all_cases, relative_error

CASES = all_cases()
DEVICE = torch.device("cuda")  # torch's word, also where it is built for another vendor


def make_ready(features):
    """Compile the kernels of all cases at once, by all cores."""
    with compile_ahead():
        for case in CASES:
            if case.runs_on(features):
                case.run(case.make(DEVICE, 0), features)
    return features


def check(case, features):
    """The kernel against plain torch."""
    if not case.runs_on(features):
        pytest.skip(f"missing capability: the device does not convert {case.converts}")
    want = case.reference(case.make(DEVICE, 0))
    got = case.run(case.make(DEVICE, 0), features)
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) <= case.tolerance
