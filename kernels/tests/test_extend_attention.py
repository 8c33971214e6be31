# SPDX-License-Identifier: Apache-2.0
"""Extend attention against the reference, on shuffled slots among poisoned ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernels.tests.offline import compile_launches

from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
from bedplate.batch.forward_mode import ForwardMode
from bedplate.contract import AttentionBuild, AttentionCallSpec, KVPoolRequest
from bedplate.memory.kv_pool import LayeredKVPool
from bedplate.reference.attention import ReferenceAttention
from bedplate.reference.runtime import TorchRuntime
from bedplate_triton import extend_attention as module
from bedplate_triton.extend_attention import extend_attention, meta, split, supports

PLAIN = AttentionCallSpec(
    call_id=0, module="attn", num_heads=6, num_kv_heads=2, head_dim=16, value_dim=16, scale=0.3
)
CALLS = {
    "plain": PLAIN,
    "one head each": replace(PLAIN, num_heads=2),
    "eight a key": replace(PLAIN, num_heads=8, num_kv_heads=1),
    "64": replace(PLAIN, head_dim=64, value_dim=64, scale=0.125),
    "80": replace(PLAIN, head_dim=80, value_dim=80, scale=0.11),
    "128": replace(PLAIN, head_dim=128, value_dim=128, scale=0.09),
    "odd sizes": replace(PLAIN, head_dim=24, value_dim=40),
    "window": replace(PLAIN, window=5),
    "wide window": replace(PLAIN, window=100),
    "chunk": replace(PLAIN, chunk=8),
    "window in a chunk": replace(PLAIN, chunk=64, window=40),
    "softcap": replace(PLAIN, softcap=2.0),
    "sinks": replace(PLAIN, sinks=True),
    "sinks and window": replace(PLAIN, sinks=True, window=7),
    "both ways": replace(PLAIN, causal=False),
    "both ways in a chunk": replace(PLAIN, causal=False, chunk=50, window=20),
    "latent": replace(
        PLAIN, num_heads=8, num_kv_heads=1, head_dim=80, value_dim=64, value_in_key=True
    ),
    "latent, narrow": replace(
        PLAIN, num_kv_heads=1, head_dim=64, value_dim=24, value_in_key=True
    ),
}
LENGTHS = [1, 70, 3, 129, 20]
FRESH = {
    "whole prompts": LENGTHS,
    "on a prefix": [1, 33, 2, 64, 7],
    "mixed": [1, 1, 3, 100, 0],  # the last is a row of padding: it writes nothing
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}
POOL, ROWS, CONTEXT = 256, len(LENGTHS) + 1, 160


def fill(call, dtype):
    """A pool whose used slots are random and whose others are NaN, and its table."""
    runtime = TorchRuntime("cpu")
    pages = LayeredKVPool(
        KVPoolRequest(runtime=runtime, calls=(call,), num_tokens=POOL, page_size=1, dtype=dtype)
    )
    generator = torch.Generator().manual_seed(7)
    slots = torch.randperm(POOL, generator=generator).int() + 1
    table = torch.zeros((ROWS, CONTEXT), dtype=torch.int32)
    for row, part in enumerate(slots[: sum(LENGTHS)].split(LENGTHS), start=1):
        table[row, : len(part)] = part
    mine = slots[: sum(LENGTHS)].long()
    stored = [pages.key(0)] if call.value_in_key else [pages.key(0), pages.value(0)]
    for storage in stored:
        storage.fill_(float("nan"))
        used = torch.randn((len(mine), *storage.shape[1:]), generator=generator)
        storage[mine] = used.to(dtype)
    return AttentionBuild(
        runtime=runtime,
        calls=(call,),
        kv_pool=pages,
        req_to_token=table,
        page_size=1,
        dtype=dtype,
        max_batch_size=8,
        max_context_len=CONTEXT,
    )


def batch_of(fresh):
    """The last ``fresh[i]`` tokens of request i are new; a request without any is padding."""
    lens, new = (torch.tensor(x, dtype=torch.int32) for x in (LENGTHS, fresh))
    part = ExtendPart(
        seq_lens=new,
        prefix_lens=lens - new,
        start_loc=(new.cumsum(0) - new).int(),
        seq_lens_cpu=new,
        prefix_lens_cpu=lens - new,
    )
    rows = torch.arange(1, len(fresh) + 1, dtype=torch.int32)
    return ForwardBatch(
        mode=ForwardMode.EXTEND,
        batch_size=len(fresh),
        input_ids=torch.zeros(sum(fresh), dtype=torch.int64),
        positions=torch.zeros(sum(fresh), dtype=torch.int64),
        req_pool_indices=torch.where(new > 0, rows, 0),
        seq_lens=lens,
        seq_lens_cpu=lens,
        out_cache_loc=torch.zeros(sum(fresh), dtype=torch.int32),
        extend=part,
    )


def draw(call, tokens, dtype):
    """Queries as models hand them over, strided, and sinks if the call has them."""
    generator = torch.Generator().manual_seed(11)
    q = torch.randn((call.num_heads, tokens, call.head_dim), generator=generator)
    sinks = torch.randn(call.num_heads, generator=generator) if call.sinks else None
    return q.to(dtype).transpose(0, 1), sinks


def launch(built, call, batch, q, sinks, device, *, spare=3):
    """The result, and what the kernel made of ``spare`` rows behind it that nobody owns."""
    keys = built.kv_pool.key(0).to(device)
    size = call.value_dim
    values = keys[..., :size] if call.value_in_key else built.kv_pool.value(0).to(device)
    shape = (call.num_heads, len(q) + spare, size)
    out = torch.full(shape, float("nan"), dtype=q.dtype, device=device).transpose(0, 1)
    extend_attention(
        q.to(device),
        keys,
        values,
        built.req_to_token.to(device),
        batch.req_pool_indices.to(device),
        batch.seq_lens.to(device),
        batch.extend.start_loc.to(device),
        batch.extend.seq_lens.to(device),
        out,
        max_extend_len=int(batch.extend.seq_lens_cpu.max()),
        scale=call.scale,
        causal=call.causal,
        window=call.window or 0,
        chunk=call.chunk or 0,
        softcap=call.softcap or 0.0,
        sinks=None if sinks is None else sinks.to(device),
    )
    return out.cpu().split([len(q), spare])


def check(call, fresh, dtype, device, *, stored=None):
    built, batch = fill(call, stored or dtype), batch_of(fresh)
    q, sinks = draw(call, sum(fresh), dtype)
    ours, behind = launch(built, call, batch, q, sinks, device)
    theirs = ReferenceAttention(built).forward_extend(q, None, None, call, batch, sinks=sinks)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert behind.isnan().all()


@pytest.mark.parametrize("fresh", FRESH.values(), ids=FRESH.keys())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_equals_the_reference(call, dtype, fresh, device):
    check(call, fresh, dtype, device)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_small_tiles_give_the_same(call, device, monkeypatch):
    """Small tiles pass through masked, free and masked blocks at short lengths."""
    chosen = meta(call.head_dim, call.value_dim, torch.float32)
    small = chosen | {"BLOCK_M": 16, "BLOCK_N": 16}
    monkeypatch.setattr(module, "meta", lambda *_: small)
    check(call, FRESH["on a prefix"], torch.float32, device)


def test_multi_head_latent_sizes(device):
    """576 and 512: two products a tile of keys, and values that are the keys."""
    latent = {"num_kv_heads": 1, "head_dim": 576, "value_dim": 512, "value_in_key": True}
    check(replace(PLAIN, scale=0.04, **latent), FRESH["on a prefix"], torch.float16, device)


def test_a_cache_of_another_dtype(device):
    """Narrow floats are widened to the dtype of the queries."""
    check(PLAIN, FRESH["mixed"], torch.float16, device, stored=torch.float8_e4m3fn)


def test_a_batch_of_padding_alone_writes_nothing(device):
    built, batch = fill(PLAIN, torch.float32), batch_of([0] * len(LENGTHS))
    q, _ = draw(PLAIN, 0, torch.float32)
    _, behind = launch(built, PLAIN, batch, q, None, device)
    assert behind.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [16, 24, 64, 80, 96, 128, 192, 256, 384, 576])
def test_tiles_cover_every_column_with_powers_of_two(size, dtype):
    main, tail = split(size)
    chosen = meta(size, size, dtype)
    blocks = [main, chosen["BLOCK_M"], chosen["BLOCK_N"], *([tail] if tail else [])]
    assert all(block >= 16 and block & (block - 1) == 0 for block in blocks)
    assert size <= main + tail < max(32, 2 * size)
    assert tail < main


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"),
    [
        ((577, 512), torch.bfloat16, "exceed 576 and 512"),
        ((576, 513), torch.float16, "exceed 576 and 512"),
        ((257, 64), torch.float32, "exceed 256 and 256"),
        ((64, 64), torch.float64, "not torch.float64"),
    ],
)
def test_refuses_with_a_reason(sizes, dtype, reason):
    verdict = supports(*sizes, dtype)
    assert not verdict
    assert reason in verdict.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(16, 16), (80, 80), (128, 128), (256, 256), (576, 512)])
def test_supports_the_sizes_that_it_tiles(sizes, dtype):
    assert supports(*sizes, dtype)


LAUNCHES = """
import torch

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

def launch(heads, kv_heads, size, value_size, dtype, latent=False, **options):
    q, out = empty(4, heads, size, dtype=dtype), empty(4, heads, value_size, dtype=dtype)
    keys = empty(5000, kv_heads, size, dtype=dtype)
    wide = empty(5000, kv_heads, 2 * size, dtype=dtype)
    values = (keys if latent else wide)[..., :value_size]
    table, ints = empty(9, 4096, dtype=torch.int32), empty(4, dtype=torch.int32)
    extend_attention(
        q, keys, values, table, ints, ints, ints, ints, out,
        max_extend_len=1024, scale=1.0, **options,
    )

bf16 = torch.bfloat16
launch(32, 8, 128, 128, bf16)
launch(64, 8, 64, 64, bf16, window=128, softcap=50.0, sinks=empty(64, dtype=bf16))
launch(8, 4, 256, 256, torch.float16, chunk=8192)
launch(128, 1, 576, 512, bf16, latent=True)
launch(32, 8, 80, 80, torch.float32)
"""


def test_compiles_for_sm_90():
    """Within 227 KiB of shared memory; the widest tiles may spill a little."""
    compiled = compile_launches("bedplate_triton.extend_attention", LAUNCHES)
    assert len(compiled) == 5
    assert max(kernel["shared"] for kernel in compiled) <= 227 * 1024
    budget = [0, 0, 32, 256, 0]
    assert all(kernel["stack"] <= most for kernel, most in zip(compiled, budget, strict=True))
    products = ["wgmma" in kernel["assembly"] for kernel in compiled]
    assert products == [True] * 4 + [False]  # float32 stays exact
