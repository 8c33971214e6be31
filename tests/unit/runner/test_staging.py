# SPDX-License-Identifier: Apache-2.0
"""The one staging copy: what arrives equals what the scheduler wrote."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bedplate.batch.forward_mode import ForwardMode
from bedplate.batch.schedule_batch import ScheduleBatch, TableUpdate
from bedplate.errors import InternalError
from bedplate.reference.runtime import TorchRuntime
from bedplate.runner.staging import Staging

WIDTH = 32


def staging(unified, index_dtype=torch.int64, capacity=256):
    table = torch.zeros((9, WIDTH), dtype=torch.int32)
    made = Staging(
        TorchRuntime("cpu"), table, index_dtype, unified=unified, capacity_bytes=capacity
    )
    return made, table


@st.composite
def batches(draw):
    size = draw(st.integers(1, 6))
    prefix = draw(st.lists(st.integers(0, 10), min_size=size, max_size=size))
    fresh = draw(st.lists(st.integers(1, 6), min_size=size, max_size=size))
    decode = draw(st.booleans())
    fresh = [1] * size if decode else fresh
    lens = np.array(prefix, np.int32) + np.array(fresh, np.int32)
    tokens = sum(fresh)
    positions = np.concatenate(
        [np.arange(p, p + f) for p, f in zip(prefix, fresh, strict=False)]
    )
    ids = np.array(
        draw(st.lists(st.integers(0, 99), min_size=tokens, max_size=tokens)), np.int64
    )
    return ScheduleBatch(
        mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
        req_pool_indices=np.arange(1, size + 1, dtype=np.int32),
        seq_lens=lens,
        input_ids=ids,
        positions=positions.astype(np.int64),
        out_cache_loc=np.arange(1, tokens + 1, dtype=np.int32),
        extend_seq_lens=None if decode else np.array(fresh, np.int32),
        extend_prefix_lens=None if decode else np.array(prefix, np.int32),
    )


@given(batches(), st.sampled_from([torch.int32, torch.int64]))
@settings(max_examples=60, deadline=None)
def test_copied_and_shared_memory_give_the_same_batch(batch, index_dtype):
    rows = None if batch.extend_seq_lens is None else np.arange(2, dtype=np.int64)
    copied = staging(False, index_dtype)[0].stage(batch, rows)
    shared = staging(True, index_dtype)[0].stage(batch, rows)
    copied.check()
    shared.check()
    for name in ("input_ids", "positions", "req_pool_indices", "seq_lens", "out_cache_loc"):
        torch.testing.assert_close(getattr(copied, name), getattr(shared, name))
    assert copied.out_cache_loc.dtype == index_dtype
    if rows is None:
        assert copied.extend is None
        assert copied.logits_rows is None
    else:
        assert copied.logits_rows.tolist() == rows.tolist()
        starts = np.cumsum(batch.extend_seq_lens) - batch.extend_seq_lens
        assert copied.extend.start_loc.tolist() == starts.tolist()
        assert copied.extend.prefix_lens.tolist() == batch.extend_prefix_lens.tolist()


@given(batches())
@settings(max_examples=60, deadline=None)
def test_the_devices_table_learns_new_tokens_and_cached_prefixes(batch):
    made, table = staging(False)
    cached = TableUpdate(
        rows=np.array([1], np.int32),
        columns=np.array([WIDTH - 1], np.int32),
        slots=np.array([77], np.int32),
    )
    from dataclasses import replace

    made.stage(replace(batch, table_update=cached), None)
    expected = np.zeros((9, WIDTH), np.int32)
    expected[1, WIDTH - 1] = 77
    fresh = batch.extend_seq_lens
    rows = batch.req_pool_indices if fresh is None else np.repeat(batch.req_pool_indices, fresh)
    expected[rows, batch.positions] = batch.out_cache_loc
    assert (table.numpy() == expected).all()


def test_a_batch_stays_intact_while_the_next_is_packed():
    made, _ = staging(False, capacity=64)
    size = 40
    make = lambda value: ScheduleBatch(  # noqa: E731
        mode=ForwardMode.DECODE,
        req_pool_indices=np.full(size, 1, np.int32),
        seq_lens=np.full(size, 2, np.int32),
        input_ids=np.full(size, value, np.int64),
        positions=np.full(size, 1, np.int64),
        out_cache_loc=np.full(size, 3, np.int32),
    )
    first = made.stage(make(5), None)
    second = made.stage(make(6), None)
    assert set(first.input_ids.tolist()) == {5}
    assert set(second.input_ids.tolist()) == {6}


def test_an_extend_batch_without_lengths_is_our_mistake_and_says_so():
    made, _ = staging(True)
    one = np.ones(1, np.int32)
    wrong = ScheduleBatch(
        mode=ForwardMode.EXTEND,
        req_pool_indices=one,
        seq_lens=one,
        input_ids=one.astype(np.int64),
        positions=one.astype(np.int64),
        out_cache_loc=one,
    )
    with pytest.raises(InternalError, match="EXTEND"):
        made.stage(wrong, None)
