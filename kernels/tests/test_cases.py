# SPDX-License-Identifier: Apache-2.0
"""Every case against plain torch; that cases leave nothing out."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bedplate_triton.cases import NARROW, all_cases, relative_error
from bedplate_triton.features import Features

ON_DEVICE = torch.accelerator.is_available()
EVERY_NARROW = tuple(converts for *_, converts in NARROW if converts)
FEATURES = Features(cores=4, shared_bytes=96 << 10, narrow=() if ON_DEVICE else EVERY_NARROW)
CASES = [c for c in all_cases(small=None if ON_DEVICE else True) if c.runs_on(FEATURES)]
DTYPES = {torch.float32, torch.float16, torch.bfloat16}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_equals_plain_torch(case, device):
    want = case.reference(case.make(device, 0))
    got = case.run(case.make(device, 0), FEATURES)
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) <= case.tolerance


def test_labels_are_unique():
    labels = [case.label for case in all_cases()]
    assert len(set(labels)) == len(labels)


def test_every_operation_has_a_small_case_of_every_dtype():
    found = defaultdict(set)
    for case in all_cases(small=True):
        tensors = tree_leaves(case.make(torch.device("meta"), 0))
        found[case.op] |= {t.dtype for t in tensors if isinstance(t, torch.Tensor)}
    found.pop("decode_step")  # integers only
    assert {op: DTYPES - dtypes for op, dtypes in found.items() if DTYPES - dtypes} == {}


def test_a_case_is_asked_of_devices_that_have_what_it_is_about():
    asked = {case.converts for case in all_cases() if case.runs_on(Features())}
    assert asked == {""}
    narrow = Features(narrow=("float8_e4m3fnuz",))
    assert {c.converts for c in all_cases() if c.runs_on(narrow)} == {"", "float8_e4m3fnuz"}
