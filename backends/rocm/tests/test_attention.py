# SPDX-License-Identifier: Apache-2.0
"""The neutral kernels under this backend's name, and when it refuses.

On the accelerator where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends.rocm.tests.paged import run

from bedplate.contract import AttentionCallSpec, AttentionRequest
from bedplate.reference.attention import ReferenceAttention
from bedplate_rocm.attention import TritonAttention, providers
from bedplate_rocm.plugin import backend

CALL = AttentionCallSpec(
    call_id=0, module="attn", num_heads=6, num_kv_heads=2, head_dim=32, value_dim=32, scale=0.2
)
LENGTHS = (16, 70, 1)


@pytest.mark.skipif(
    torch.accelerator.is_available() and torch.version.hip is None,
    reason="missing capability: the accelerator here is not one of this backend",
)
@pytest.mark.parametrize("fresh", [(1, 1, 1), (16, 20, 1)], ids=["decode", "prompts"])
@pytest.mark.parametrize(
    ("page", "dtype", "tolerance"), [(16, torch.float32, 1e-4), (1, torch.float16, 1e-2)]
)
def test_equals_the_reference(request, page, dtype, tolerance, fresh):
    if not torch.accelerator.is_available():
        request.getfixturevalue("hip")
    ours = run(TritonAttention, CALL, LENGTHS, fresh, dtype=dtype, page=page)
    theirs = run(ReferenceAttention, CALL, LENGTHS, fresh, dtype=dtype, page=page)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"kv_dtype": "float8_e4m3fnuz"}, ""),
        ({"kv_dtype": "float8_e4m3fn"}, "float8_e4m3fnuz and float8_e5m2fnuz"),
        ({"arch": "gfx950", "kv_dtype": "float8_e4m3fn"}, ""),
        ({"arch": "gfx90a", "kv_dtype": "float8_e4m3fnuz"}, "of the model's bfloat16, not"),
        ({"dtype": "float64", "kv_dtype": "float64"}, "not torch.float64"),
        ({"calls": (replace(CALL, causal=False),)}, "attn sees later tokens"),
        ({"calls": (replace(CALL, head_dim=1024),)}, "exceed"),
    ],
)
def test_refusals(change, reason):
    asked = {"calls": (CALL,), "dtype": "bfloat16", "kv_dtype": "bfloat16", "page_size": 16,
             "arch": "gfx942"}  # fmt: skip
    answer = providers()[0].supports(AttentionRequest(**{**asked, **change}))
    assert bool(answer) is not bool(reason)
    assert reason in answer.reason


def test_what_is_offered():
    offered = []
    backend.bedplate_register_attention(offered.append)
    assert [(each.name, each.provider) for each in offered] == [
        ("triton", "rocm"), ("aiter", "rocm"),
    ]  # fmt: skip
    assert offered[0].priority > offered[1].priority
