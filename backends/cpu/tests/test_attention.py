# SPDX-License-Identifier: Apache-2.0
"""Every attention of the CPU backend against the reference, on shuffled pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
from bedplate.batch.forward_mode import ForwardMode
from bedplate.contract import AttentionBuild, AttentionCallSpec, AttentionRequest, KVPoolRequest
from bedplate.errors import ContractError
from bedplate.memory.kv_pool import LayeredKVPool
from bedplate.reference.attention import ReferenceAttention
from bedplate.reference.runtime import TorchRuntime
from bedplate_cpu import native
from bedplate_cpu.attention import providers

PLAIN = AttentionCallSpec(
    call_id=0, module="attn", num_heads=4, num_kv_heads=2, head_dim=16, value_dim=16, scale=0.3
)
CALLS = {
    "plain": PLAIN,
    "one head each": replace(PLAIN, num_kv_heads=4),
    "one key for all": replace(PLAIN, num_kv_heads=1),
    "odd sizes": replace(PLAIN, head_dim=24, value_dim=40),
    "window": replace(PLAIN, window=5),
    "chunk": replace(PLAIN, chunk=8),
    "softcap": replace(PLAIN, softcap=2.0),
    "sinks": replace(PLAIN, sinks=True),
    "latent": replace(PLAIN, num_kv_heads=1, head_dim=24, value_dim=16, value_in_key=True),
}
LENGTHS = {
    "one": [1],
    "ragged": [3, 70, 1, 129, 20],
    "equal": [64, 64],
    "skewed": [300, 2, 2, 2],
    "short": [21, 4, 1, 2],  # one group, and not in the order of its lengths
}


def build(call, dtype, lengths):
    pages = LayeredKVPool(
        KVPoolRequest(
            runtime=TorchRuntime("cpu"),
            calls=(call,),
            num_tokens=1024,
            page_size=1,
            dtype=dtype,
        )
    )
    generator = torch.Generator().manual_seed(7)
    table = torch.zeros((len(lengths) + 1, 512), dtype=torch.int32)
    slots = torch.randperm(1024, generator=generator).int() + 1
    used = 0
    for row, length in enumerate(lengths, start=1):
        table[row, :length] = slots[used : used + length]
        used += length
    storage = pages.key(0)
    storage.fill_(float("nan"))  # pages that nobody owns must not be read
    values = pages.value(0)
    values.fill_(float("nan"))
    mine = slots[:used].long()
    storage[mine] = torch.randn((used, *storage.shape[1:]), generator=generator).to(dtype)
    if not call.value_in_key:
        values[mine] = torch.randn((used, *values.shape[1:]), generator=generator).to(dtype)
    storage[0], values[0] = 0, 0
    return AttentionBuild(
        runtime=TorchRuntime("cpu"),
        calls=(call,),
        kv_pool=pages,
        req_to_token=table,
        page_size=1,
        dtype=dtype,
        max_batch_size=8,
        max_context_len=512,
    )


def batch_of(built, lengths, fresh):
    """The last ``fresh[i]`` tokens of each request are new."""
    table = built.req_to_token
    lens = torch.tensor(lengths, dtype=torch.int32)
    new = torch.tensor(fresh, dtype=torch.int32)
    loc = torch.cat(
        [table[r + 1, n - f : n] for r, (n, f) in enumerate(zip(lengths, fresh, strict=False))]
    )
    decode = fresh == [1] * len(fresh)
    part = ExtendPart(
        seq_lens=new,
        prefix_lens=lens - new,
        start_loc=(new.cumsum(0) - new).int(),
        seq_lens_cpu=new,
        prefix_lens_cpu=lens - new,
    )
    return ForwardBatch(
        mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
        batch_size=len(lengths),
        input_ids=torch.zeros(len(loc), dtype=torch.int64),
        positions=torch.zeros(len(loc), dtype=torch.int64),
        req_pool_indices=torch.arange(1, len(lengths) + 1, dtype=torch.int32),
        seq_lens=lens,
        seq_lens_cpu=lens,
        out_cache_loc=loc,
        extend=None if decode else part,
    )


def run(make, call, lengths, fresh, dtype):
    built = build(call, dtype, lengths)
    batch = batch_of(built, lengths, fresh)
    generator = torch.Generator().manual_seed(11)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    tokens = batch.num_tokens
    q = draw(call.num_heads, tokens, call.head_dim).transpose(0, 1)  # as models hand it over
    k = draw(tokens, call.num_kv_heads, call.head_dim)
    v = None if call.value_in_key else draw(tokens, call.num_kv_heads, call.value_dim)
    sinks = draw(call.num_heads) if call.sinks else None
    attention = make(built)
    attention.prepare(batch)
    return attention.forward(q, k, v, call, batch, sinks=sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("provider", providers(), ids=lambda p: p.name)
@pytest.mark.parametrize("kind", ["decode", "extend", "chunk"])
def test_equals_the_reference(provider, call, lengths, dtype, kind):
    name = str(dtype).removeprefix("torch.")
    request = AttentionRequest(calls=(call,), dtype=name, kv_dtype=name, page_size=1)
    if not provider.supports(request):
        assert provider.name != "native" or native.load().library is None
        with pytest.raises(AssertionError):  # what it refuses it really cannot do
            torch.testing.assert_close(
                run(provider.build, call, [70], [1], dtype),
                run(ReferenceAttention, call, [70], [1], dtype),
                atol=1e-5,
                rtol=1e-5,
            )
        return
    fresh = {
        "decode": [1] * len(lengths),
        "extend": list(lengths),
        "chunk": [max(1, length // 2) for length in lengths],
    }[kind]
    ours = run(provider.build, call, lengths, fresh, dtype)
    theirs = run(ReferenceAttention, call, lengths, fresh, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_a_call_beyond_the_kernels_buffers_is_refused_and_never_answered():
    big = replace(PLAIN, num_heads=65, num_kv_heads=1)
    native_provider = next(p for p in providers() if p.name == "native")
    request = AttentionRequest(calls=(big,), dtype="float32", kv_dtype="float32", page_size=1)
    assert not native_provider.supports(request)
    if native.load().library is not None:
        with pytest.raises(ContractError, match="buffers"):
            run(native_provider.build, big, [3], [1], torch.float32)
