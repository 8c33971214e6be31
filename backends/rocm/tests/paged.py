# SPDX-License-Identifier: Apache-2.0
"""A paged cache whose other slots are NaN, and passes over it; two runs of one seed agree."""

from __future__ import annotations

import torch

from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
from bedplate.batch.forward_mode import ForwardMode
from bedplate.contract import AttentionBuild, KVPoolRequest
from bedplate.memory.kv_pool import LayeredKVPool
from bedplate.reference.runtime import TorchRuntime

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
CONTEXT = 256


def build(call, lengths, dtype, page):
    """What an attention is built from; requests own shuffled pages."""
    generator = torch.Generator().manual_seed(7)
    pages = [-(-length // page) for length in lengths]
    count = sum(pages) + 4
    runtime = TorchRuntime(DEVICE)
    pool = LayeredKVPool(
        KVPoolRequest(
            runtime=runtime, calls=(call,), num_tokens=count * page, page_size=page, dtype=dtype
        )
    )
    order = torch.randperm(count, generator=generator).int() + 1
    table = torch.zeros((len(lengths) + 1, CONTEXT), dtype=torch.int32)
    begin = 0
    for row, (mine, length) in enumerate(zip(pages, lengths, strict=True), start=1):
        slots = order[begin : begin + mine, None] * page + torch.arange(page, dtype=torch.int32)
        table[row, :length] = slots.flatten()[:length]
        table[row, length : mine * page] = slots.flatten()[length:]
        begin += mine
    used = torch.cat([table[row, :n] for row, n in enumerate(lengths, start=1)]).long()
    for storage in (pool.key(call.call_id), pool.value(call.call_id)):
        drawn = torch.randn((len(used), *storage.shape[1:]), generator=generator)
        storage[page:] = float("nan")
        storage[used.to(DEVICE)] = drawn.to(DEVICE, dtype)
    return AttentionBuild(
        runtime=runtime, calls=(call,), kv_pool=pool, req_to_token=table.to(DEVICE),
        page_size=page, dtype=dtype, max_batch_size=len(lengths), max_context_len=CONTEXT,
    )  # fmt: skip


def batch_of(built, lengths, fresh):
    """The last ``fresh[i]`` tokens of each request are new."""
    table = built.req_to_token.cpu()
    lens, new = (torch.tensor(numbers, dtype=torch.int32) for numbers in (lengths, fresh))
    pairs = enumerate(zip(lengths, fresh, strict=True), start=1)
    places = torch.cat([table[row, n - f : n] for row, (n, f) in pairs])
    part = ExtendPart(
        seq_lens=new.to(DEVICE),
        prefix_lens=(lens - new).to(DEVICE),
        start_loc=(new.cumsum(0) - new).int().to(DEVICE),
        seq_lens_cpu=new,
        prefix_lens_cpu=lens - new,
    )
    decode = set(fresh) == {1}
    return ForwardBatch(
        mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
        batch_size=len(lengths),
        input_ids=torch.zeros(len(places), dtype=torch.int64, device=DEVICE),
        positions=torch.zeros(len(places), dtype=torch.int64, device=DEVICE),
        req_pool_indices=torch.arange(1, len(lengths) + 1, dtype=torch.int32, device=DEVICE),
        seq_lens=lens.to(DEVICE),
        seq_lens_cpu=lens,
        out_cache_loc=places.to(DEVICE),
        extend=None if decode else part,
    )


def run(make, call, lengths, fresh, *, dtype=torch.float32, page=16):
    """What an attention gives for a pass."""
    built = build(call, lengths, dtype, page)
    batch = batch_of(built, lengths, fresh)
    generator = torch.Generator().manual_seed(11)

    def draw(heads, size):
        drawn = torch.randn((batch.num_tokens, heads, size), generator=generator)
        return drawn.to(DEVICE, dtype)

    q = draw(call.num_heads, call.head_dim)
    k = draw(call.num_kv_heads, call.head_dim)
    v = draw(call.num_kv_heads, call.value_dim)
    attention = make(built)
    attention.prepare(batch)
    attention.prepare_in_graph(batch)
    return attention.forward(q, k, v, call, batch)
