# SPDX-License-Identifier: Apache-2.0
"""Decode attention against the reference, on shuffled slots among poisoned ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.tests.offline import compile_launches

from bedplate.batch.forward_batch import ForwardBatch
from bedplate.batch.forward_mode import ForwardMode
from bedplate.contract import AttentionBuild, AttentionCallSpec, KVPoolRequest
from bedplate.errors import UnsupportedError
from bedplate.memory.kv_pool import LayeredKVPool
from bedplate.reference.attention import ReferenceAttention
from bedplate.reference.runtime import TorchRuntime
from bedplate_triton.decode_attention import choose_splits, decode_attention, meta

PLAIN = AttentionCallSpec(
    call_id=0, module="attn", num_heads=6, num_kv_heads=2, head_dim=16, value_dim=16, scale=0.3
)
CALLS = {
    "plain": PLAIN,
    "one head each": replace(PLAIN, num_heads=2),
    "eight a key": replace(PLAIN, num_heads=8, num_kv_heads=1),
    "twenty a key": replace(PLAIN, num_heads=20, num_kv_heads=1),
    "forty a key": replace(PLAIN, num_heads=40, num_kv_heads=1),
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
    "sinks and window": replace(PLAIN, sinks=True, window=100),
    "latent": replace(
        PLAIN, num_heads=8, num_kv_heads=1, head_dim=24, value_dim=16, value_in_key=True
    ),
    "latent, narrow": replace(
        PLAIN, num_kv_heads=1, head_dim=64, value_dim=24, value_in_key=True
    ),
}
LENGTHS = [1, 70, 0, 129, 3, 16]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}
POOL, ROWS, CONTEXT = 256, len(LENGTHS) + 1, 160


def fill(call, dtype, lengths):
    """A pool whose used slots are random and whose others are NaN, and its table."""
    runtime = TorchRuntime("cpu")
    pages = LayeredKVPool(
        KVPoolRequest(runtime=runtime, calls=(call,), num_tokens=POOL, page_size=1, dtype=dtype)
    )
    generator = torch.Generator().manual_seed(7)
    slots = torch.randperm(POOL, generator=generator).int() + 1
    table = torch.zeros((ROWS, CONTEXT), dtype=torch.int32)
    for row, part in enumerate(slots[: sum(lengths)].split(lengths), start=1):
        table[row, : len(part)] = part
    mine = slots[: sum(lengths)].long()
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


def draw(call, batch_size, dtype):
    """Queries as models hand them over, strided, and sinks if the call has them."""
    generator = torch.Generator().manual_seed(11)
    q = torch.randn((call.num_heads, batch_size, call.head_dim), generator=generator)
    sinks = torch.randn(call.num_heads, generator=generator) if call.sinks else None
    return q.to(dtype).transpose(0, 1), sinks


def expect(built, call, lengths, q, sinks):
    lens = torch.tensor(lengths, dtype=torch.int32)
    count = len(lengths)
    batch = ForwardBatch(
        mode=ForwardMode.DECODE,
        batch_size=count,
        input_ids=torch.zeros(count, dtype=torch.int64),
        positions=torch.zeros(count, dtype=torch.int64),
        req_pool_indices=torch.arange(1, count + 1, dtype=torch.int32),
        seq_lens=lens,
        seq_lens_cpu=lens,
        out_cache_loc=torch.zeros(count, dtype=torch.int32),
    )
    return ReferenceAttention(built).forward(q, None, None, call, batch, sinks=sinks)


def launch(built, call, lengths, q, sinks, splits, device):
    """Everything the kernel may not read, or must write, is NaN before."""
    count, heads, size = len(lengths), call.num_heads, call.value_dim
    keys = built.kv_pool.key(0).to(device)
    values = keys[..., :size] if call.value_in_key else built.kv_pool.value(0).to(device)
    nan = {"fill_value": float("nan"), "device": device}
    out = torch.full((heads, count, size), dtype=q.dtype, **nan).transpose(0, 1)
    decode_attention(
        q.to(device),
        keys,
        values,
        built.req_to_token.to(device),
        torch.arange(1, count + 1, dtype=torch.int32, device=device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        out,
        torch.full((count, heads, splits, size), **nan),
        torch.full((count, heads, splits), **nan),
        scale=call.scale,
        window=call.window or 0,
        chunk=call.chunk or 0,
        softcap=call.softcap or 0.0,
        sinks=None if sinks is None else sinks.to(device),
    )
    return out.cpu()


@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_equals_the_reference(call, dtype, splits, device):
    built = fill(call, dtype, LENGTHS)
    q, sinks = draw(call, len(LENGTHS), dtype)
    ours = launch(built, call, LENGTHS, q, sinks, splits, device)
    theirs = expect(built, call, LENGTHS, q, sinks)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert not ours[LENGTHS.index(0)].any()


def test_multi_head_latent_sizes(device):
    """576 and 512: two products a tile of keys, and values that are the keys."""
    call = replace(
        PLAIN, num_kv_heads=1, head_dim=576, value_dim=512, scale=0.04, value_in_key=True
    )
    built = fill(call, torch.float16, [70])
    q, _ = draw(call, 1, torch.float16)
    ours = launch(built, call, [70], q, None, 2, device)
    torch.testing.assert_close(ours, expect(built, call, [70], q, None), atol=1e-2, rtol=1e-2)


def test_a_cache_of_another_dtype(device):
    """Narrow floats are widened to the dtype of the queries."""
    built = fill(PLAIN, torch.float8_e4m3fn, [70])
    q, _ = draw(PLAIN, 1, torch.float16)
    ours = launch(built, PLAIN, [70], q, None, 2, device)
    torch.testing.assert_close(ours, expect(built, PLAIN, [70], q, None), atol=1e-2, rtol=1e-2)


@given(
    batch=st.integers(1, 512),
    heads=st.integers(1, 128),
    context=st.integers(1, 1 << 20),
    cores=st.integers(1, 256),
)
def test_splits_are_powers_of_two_that_do_not_grow_with_the_batch(batch, heads, context, cores):
    splits = choose_splits(batch, heads, context, cores)
    assert splits in {1, 2, 4, 8, 16, 32, 64}
    assert splits == 1 or splits * 128 <= context
    assert splits >= choose_splits(batch + 1, heads, context, cores)
    assert splits <= choose_splits(batch, heads, 2 * context, cores)


@pytest.mark.parametrize(
    ("batch", "context", "splits"),
    [(1, 4096, 32), (1, 32768, 64), (16, 4096, 4), (64, 4096, 1)],
)
def test_splits_with_eight_heads_on_132_cores(batch, context, splits):
    assert choose_splits(batch, 8, context, 132) == splits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    "sizes", [(16, 16), (24, 40), (80, 80), (128, 128), (192, 128), (256, 256), (576, 512)]
)
def test_sizes_cover_every_column_with_powers_of_two(sizes, dtype):
    chosen = meta(*sizes, dtype)
    blocks = [chosen.BLOCK_N, chosen.BLOCK_D, chosen.BLOCK_V]
    blocks += [chosen.BLOCK_R] if chosen.BLOCK_R else []
    assert all(block >= 16 and block & (block - 1) == 0 for block in blocks)
    assert sizes[0] <= chosen.BLOCK_D + chosen.BLOCK_R
    assert sizes[1] <= chosen.BLOCK_V


@pytest.mark.parametrize("sizes", [(577, 64), (64, 513)])
def test_refuses_larger_heads(sizes):
    with pytest.raises(UnsupportedError, match="choose another attention"):
        meta(*sizes, torch.float16)


LAUNCHES = """
import torch

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

def launch(heads, kv_heads, size, value_size, splits, dtype, latent=False, **options):
    q, out = empty(4, heads, size, dtype=dtype), empty(4, heads, value_size, dtype=dtype)
    keys = empty(5000, kv_heads, size, dtype=dtype)
    wide = empty(5000, kv_heads, 2 * size, dtype=dtype)
    values = (keys if latent else wide)[..., :value_size]
    table, ints = empty(9, 4096, dtype=torch.int32), empty(4, dtype=torch.int32)
    partial, lse = empty(4, heads, splits, value_size), empty(4, heads, splits)
    decode_attention(
        q, keys, values, table, ints, ints, out, partial, lse, scale=1.0, **options
    )

bf16 = torch.bfloat16
launch(32, 8, 128, 128, 1, bf16)
launch(32, 8, 128, 128, 64, bf16)
launch(64, 8, 64, 64, 8, bf16, window=128, softcap=50.0, sinks=empty(64, dtype=bf16))
launch(8, 4, 256, 256, 4, torch.float16, chunk=8192)
launch(32, 8, 80, 80, 1, torch.float32)
launch(128, 1, 576, 512, 16, bf16, latent=True)
"""


def test_compiles_for_sm_90():
    """Splits and merges, within the registers and the 227 KiB of shared memory of a core."""
    compiled = compile_launches("bedplate_triton.decode_attention", LAUNCHES)
    assert len(compiled) == 10  # four of the six launches merge
    assert [kernel["stack"] for kernel in compiled] == [0] * 10
    assert max(kernel["shared"] for kernel in compiled) <= 227 * 1024
    products = [kernel for kernel in compiled if "mma.sync" in kernel["assembly"]]
    assert len(products) == 5  # all splits but that of float32, which stays exact
