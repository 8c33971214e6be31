# SPDX-License-Identifier: Apache-2.0
"""AMD's library is found, examined and called as it wants to be; a stand-in does the sums."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import metadata
from types import ModuleType

import pytest
import torch
from backends.rocm.tests.paged import run

from bedplate.contract import AttentionCallSpec, AttentionRequest
from bedplate.reference.attention import ReferenceAttention
from bedplate_rocm import aiter_attention as module
from bedplate_rocm.architectures import arch_word

CALL = AttentionCallSpec(
    call_id=0, module="attn", num_heads=6, num_kv_heads=2, head_dim=32, value_dim=32, scale=0.2
)
ASKED = {"calls": (CALL,), "dtype": "bfloat16", "kv_dtype": "bfloat16", "page_size": 16,
         "arch": "gfx942"}  # fmt: skip


def unified_attention(
    q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal,
    window_size, block_table, softcap, q_descale, k_descale, v_descale, alibi_slopes=None,
):  # fmt: skip
    """The library's function by its documentation, in plain torch.

    Key position j is seen from i where j ≤ i and i − j ≤ window_size[0], if that is not −1.
    """
    assert causal
    assert (q_descale, k_descale, v_descale) == (None, None, None)
    assert k.shape == v.shape
    assert block_table.dtype == cu_seqlens_q.dtype == torch.int32
    assert q.is_contiguous()
    group = q.shape[1] // k.shape[2]
    for request, length in enumerate(seqused_k.tolist()):
        begin, end = cu_seqlens_q[request : request + 2].tolist()
        assert end - begin <= max_seqlen_q
        assert length <= max_seqlen_k
        pages = block_table[request, : -(-length // k.shape[1])].long()
        keys, values = (
            x[pages].flatten(0, 1)[:length].float().repeat_interleave(group, 1) for x in (k, v)
        )
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), keys) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(length - (end - begin), length)[:, None]
        key = torch.arange(length)[None]
        seen = key <= position
        if window_size[0] >= 0:
            seen &= position - key <= window_size[0]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)


@pytest.fixture
def library(monkeypatch, hip):
    """Install a function as the library; ``None`` leaves it uninstalled."""

    def install(function, version="0.1.29"):
        def find(name):
            if name != "amd-aiter" or version is None:
                raise metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(metadata, "version", find)
        names = module._MODULE.split(".")
        for count in range(1, len(names) + 1):
            package = ModuleType(".".join(names[:count]))
            package.__path__ = []
            monkeypatch.setitem(sys.modules, package.__name__, package)
        if function is not None:
            package.unified_attention = function

    module.find_function.cache_clear()
    yield install
    module.find_function.cache_clear()


@pytest.mark.parametrize("fresh", [(1, 1, 1), (16, 20, 1)], ids=["decode", "prompts"])
@pytest.mark.parametrize(
    "call",
    [CALL, replace(CALL, window=9), replace(CALL, softcap=2.0), replace(CALL, num_kv_heads=1)],
    ids=["plain", "window", "softcap", "one key head"],
)
def test_equals_the_reference(library, call, fresh):
    library(unified_attention)
    lengths = (16, 70, 1)
    ours = run(module.AiterAttention, call, lengths, fresh)
    theirs = run(ReferenceAttention, call, lengths, fresh)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.accelerator
@pytest.mark.skipif(torch.version.hip is None, reason="missing capability: torch for ROCm")
@pytest.mark.parametrize("fresh", [(1, 1, 1), (16, 20, 1)], ids=["decode", "prompts"])
def test_the_library_of_this_machine_equals_the_reference(fresh):
    call = replace(CALL, head_dim=128, value_dim=128, scale=0.09)
    arch = arch_word(torch.cuda.get_device_properties(0).gcnArchName)
    asked = {**ASKED, "calls": (call,), "arch": arch}
    if not (answer := module.provider.supports(AttentionRequest(**asked))):
        pytest.skip(f"missing capability: {answer.reason}")
    lengths, bits = (16, 70, 1), {"dtype": torch.bfloat16}
    ours = run(module.AiterAttention, call, lengths, fresh, **bits)
    theirs = run(ReferenceAttention, call, lengths, fresh, **bits)
    torch.testing.assert_close(ours, theirs, atol=3e-2, rtol=3e-2)


def test_it_is_possible_where_everything_is_there(library):
    library(unified_attention)
    answer = module.provider.supports(AttentionRequest(**ASKED))
    assert answer
    assert "by name only" in answer.reason


@pytest.mark.parametrize(
    ("function", "version", "reason"),
    [
        (unified_attention, None, "amd-aiter is not installed (the project 'aiter'"),
        (None, "0.1.0", "0.1.0 cannot be loaded: AttributeError"),
        (lambda q, k, v, out: None, "0.0.9", "0.0.9 does not take block_table, causal"),
    ],
)
def test_what_is_missing_is_the_reason(library, function, version, reason):
    library(function, version)
    answer = module.provider.supports(AttentionRequest(**ASKED))
    assert not answer
    assert reason in answer.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"arch": "gfx1100"}, "serves gfx942 and gfx950"),
        ({"page_size": 1}, "pages of 16"),
        ({"dtype": "float32", "kv_dtype": "float32"}, "sixteen bits"),
        ({"kv_dtype": "float8_e4m3fnuz"}, "the model's own dtype"),
        ({"calls": (replace(CALL, causal=False),)}, "later tokens"),
        ({"calls": (replace(CALL, sinks=True),)}, "sinks"),
        ({"calls": (replace(CALL, chunk=8),)}, "chunks"),
        ({"calls": (replace(CALL, value_dim=16),)}, "different sizes"),
    ],
)
def test_refusals(library, change, reason):
    library(unified_attention)
    answer = module.provider.supports(AttentionRequest(**{**ASKED, **change}))
    assert not answer
    assert reason in answer.reason
