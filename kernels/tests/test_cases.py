# SPDX-License-Identifier: Apache-2.0
"""Every case against plain torch, and every launch of every case compiled for every target."""

from __future__ import annotations

import pytest
import torch
from kernels.tests.offline import SHARED_BYTES, compile_cases

from bedplate_triton.cases import all_cases, relative_error
from bedplate_triton.features import Features

CASES = all_cases(small=None if torch.accelerator.is_available() else True)
STACK_BYTES = {"_extend_kernel": 512}
"""Spilled bytes a thread that are allowed; none elsewhere."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_equals_plain_torch(case, device):
    want = case.reference(case.make(device, 0))
    got = case.run(case.make(device, 0), Features(cores=4))
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) <= case.tolerance


def test_labels_are_unique():
    labels = [case.label for case in all_cases()]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_compiles(arch):
    for facts in compile_cases(arch):
        what = f"{facts['kernel']} of {facts['case']}"
        assert facts["shared"] <= SHARED_BYTES[arch], what
        assert facts["stack"] <= STACK_BYTES.get(facts["kernel"], 0), what
