# SPDX-License-Identifier: Apache-2.0
"""MLP-sync padding and its undo: vectors V9a–f and the traps of functions 50 and 51."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
from bedplate.batch.forward_mode import CaptureHiddenMode, ForwardMode
from bedplate.batch.logits import LogitsOutput
from bedplate.errors import InternalError
from bedplate.parallel.mlp_sync import PaddingMode, pad, pad_counts, plan_mlp_sync, unpad

MAX, SUM = PaddingMode.MAX_LEN, PaddingMode.SUM_LEN


def i32(values):
    return torch.tensor(values, dtype=torch.int32)


def tokens(n):
    return {
        "input_ids": torch.arange(n) + 100,
        "positions": torch.arange(n) + 7,
        "out_cache_loc": torch.arange(n) + 50,
    }


def decode(*seq_lens, **changes):
    n = len(seq_lens)
    fields = {
        "mode": ForwardMode.DECODE,
        "batch_size": n,
        "req_pool_indices": i32(range(1, n + 1)),
        "seq_lens": i32(seq_lens),
        "seq_lens_cpu": i32(seq_lens),
        **tokens(n),
    }
    return ForwardBatch(**{**fields, **changes})


def extend(*lens, mode=ForwardMode.EXTEND, **changes):
    n, prefix = i32(lens), i32([3] * len(lens))
    part = ExtendPart(
        seq_lens=n, prefix_lens=prefix, start_loc=n.cumsum(0, dtype=torch.int32) - n,
        seq_lens_cpu=n, prefix_lens_cpu=prefix,
    )  # fmt: skip
    fields = {
        "mode": mode,
        "extend": part,
        "logits_rows": n.cumsum(0) - 1,
        **tokens(sum(lens)),
        **changes,
    }
    return decode(*(length + 3 for length in lens), **fields)


def idle():
    return decode(mode=ForwardMode.IDLE)


def plan(batch, counts, **options):
    return plan_mlp_sync(batch, counts, **{"dp_rank": 0, "dp_size": len(counts), **options})


def fake_output(batch, *, width=3):
    """Logits and hidden states that name their rows, as a model would lay them out."""
    rows = torch.arange(batch.num_tokens)
    wanted = rows if batch.logits_rows is None else rows[batch.logits_rows]
    hidden = {CaptureHiddenMode.LAST: wanted, CaptureHiddenMode.FULL: rows}.get(
        batch.capture_hidden
    )
    return LogitsOutput(
        next_token_logits=wanted[:, None].expand(-1, width),
        hidden_states=None if hidden is None else hidden[:, None],
    )


@pytest.mark.parametrize(
    ("counts", "attn_tp", "dp", "mode", "padded", "buffer"),
    [
        ([3, 0, 5, 2], 2, 4, SUM, (4, 0, 6, 2), 12),
        ([5, 6, 5, 6], 2, 4, MAX, (6, 6, 6, 6), 24),
        ([8, 0, 0, 0], 1, 4, SUM, (8, 0, 0, 0), 8),
        ([8, 8, 0, 0], 1, 4, SUM, (8, 8, 0, 0), 16),
        ([1, 1], 4, 2, MAX, (4, 4), 8),
        ([7], 4, 1, MAX, (8,), 8),
        ([0, 0], 4, 2, SUM, (0, 0), 0),
    ],
    ids=["V9a", "V9b", "V9c", "V9d", "V9e", "V9f", "nobody"],
)
def test_counts_vectors(counts, attn_tp, dp, mode, padded, buffer):
    """V9a–f; ties (V9a, V9d) are summed. The caller's list stays as it was (function 50)."""
    before = list(counts)
    got = pad_counts(counts, attn_tp_size=attn_tp, dp_size=dp)
    assert (got.mode, got.counts, got.buffer_len) == (mode, padded, buffer)
    assert counts == before


def test_a_graph_always_pads_to_the_largest():
    got = pad_counts([8, 0], attn_tp_size=1, dp_size=2, graph=True)
    assert (got.mode, got.counts, got.buffer_len) == (MAX, (8, 8), 16)


def test_a_group_that_gathers_alone_has_its_own_buffer():
    got = pad_counts([7], attn_tp_size=2, dp_size=4, graph=True)
    assert (got.counts, got.buffer_len) == ((8,), 8)


@pytest.mark.parametrize(
    ("rank", "start", "count"), [(0, 0, 4), (1, 4, 0), (2, 4, 6), (3, 10, 2)]
)
def test_rows_start_after_the_padded_rows_of_earlier_ranks(rank, start, count):
    """V9a, offsets."""
    counts = [3, 0, 5, 2]
    batch = decode(*[4] * counts[rank]) if counts[rank] else idle()
    got = plan(batch, counts, dp_rank=rank, attn_tp_size=2)
    assert (got.start, got.num_tokens) == (start, count)


def test_decode_grows_by_requests_of_the_fill_length():
    """V9b: 5 requests run as 6, and the sum of lengths grows by the fill value 1."""
    batch = decode(9, 8, 7, 6, 5, page_table=torch.arange(10, dtype=torch.int32).view(5, 2))
    sync = plan(batch, [5, 6, 5, 6], attn_tp_size=2, fill_value=1)
    padded = pad(batch, sync)
    padded.check()
    assert (padded.mode, padded.batch_size, padded.num_tokens) == (ForwardMode.DECODE, 6, 6)
    assert padded.seq_lens.tolist() == padded.seq_lens_cpu.tolist() == [9, 8, 7, 6, 5, 1]
    for name in ("input_ids", "positions", "out_cache_loc", "req_pool_indices"):
        assert getattr(padded, name).tolist() == [*getattr(batch, name).tolist(), 0]
    assert padded.page_table.tolist() == [*batch.page_table.tolist(), [0, 0]]


def test_decode_beside_an_extending_rank_runs_as_extend_and_comes_back():
    """§6.2 masquerade: padding tokens belong to no request."""
    batch = decode(10, 4)
    sync = plan(batch, [2, 6], is_extend_in_batch=True)
    padded = pad(batch, sync)
    padded.check()
    assert (padded.mode, padded.batch_size, padded.num_tokens) == (ForwardMode.EXTEND, 2, 6)
    part = padded.extend
    assert part.seq_lens.tolist() == part.seq_lens_cpu.tolist() == [1, 1]
    assert part.prefix_lens.tolist() == part.prefix_lens_cpu.tolist() == [9, 3]
    assert part.start_loc.tolist() == [0, 1]
    assert {getattr(part, f.name).dtype for f in dataclasses.fields(part)} == {torch.int32}
    assert padded.input_ids.tolist() == [100, 101, 0, 0, 0, 0]
    assert unpad(fake_output(padded), sync).next_token_logits[:, 0].tolist() == [0, 1]


def test_decode_stays_decode_when_rows_are_summed():
    sync = plan(decode(10, 4), [2, 9, 0, 0], is_extend_in_batch=True)
    assert not sync.as_extend
    assert pad(decode(10, 4), sync).mode is ForwardMode.DECODE


def test_an_idle_rank_carries_padding_rows_and_returns_none():
    sync = plan(idle(), [0, 4], graph=True)
    padded = pad(idle(), sync)
    assert (padded.batch_size, padded.num_tokens) == (0, 4)
    assert unpad(fake_output(padded), sync).next_token_logits.shape == (0, 3)


def test_three_row_positions_are_padded_by_token():
    """Function 50 padded the three rows instead."""
    batch = decode(5, 5, positions=torch.arange(6).reshape(3, 2))
    padded = pad(batch, plan(batch, [2, 3]))
    assert padded.positions.tolist() == [[0, 1, 0], [2, 3, 0], [4, 5, 0]]


def test_the_batch_itself_is_never_changed():
    """Function 50 wrote the padding, and its backups, into the live batch."""
    batch = decode(10, 4)
    before = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    copies = {k: v.clone() for k, v in before.items() if isinstance(v, torch.Tensor)}
    pad(batch, plan(batch, [2, 6], is_extend_in_batch=True))
    assert all(getattr(batch, name) is value for name, value in before.items())
    assert all(torch.equal(before[name], copy) for name, copy in copies.items())


@pytest.mark.parametrize(("counts", "dp"), [([3, 6], 2), ([2, 6], 3)])
def test_counts_of_another_step_are_refused(counts, dp):
    with pytest.raises(InternalError, match="do not describe"):
        plan(decode(10, 4), counts, dp_size=dp)


def test_fewer_wanted_rows_than_tokens_are_all_kept():
    """Function 51 cut extend results at the sum of lengths."""
    batch = extend(4, 2, capture_hidden=CaptureHiddenMode.LAST)
    sync = plan(batch, [6, 8])
    got = unpad(fake_output(pad(batch, sync)), sync)
    assert got.next_token_logits[:, 0].tolist() == got.hidden_states[:, 0].tolist() == [3, 5]


LENS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
BATCHES = st.one_of(
    LENS.map(lambda lens: decode(*lens)),
    LENS.map(lambda lens: extend(*lens)),
    LENS.map(lambda lens: extend(*lens, mode=ForwardMode.TARGET_VERIFY, logits_rows=None)),
    LENS.map(lambda lens: extend(*lens, mode=ForwardMode.DRAFT_EXTEND)),
    st.builds(idle),
)


@given(
    BATCHES,
    st.lists(st.integers(0, 40), max_size=5),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(list(CaptureHiddenMode)),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_unpadding_gives_what_the_unpadded_pass_would(
    batch, others, attn_tp, hidden, extending, graph, data
):
    batch = dataclasses.replace(batch, capture_hidden=hidden)
    rank = data.draw(st.integers(0, len(others)))
    counts = [*others[:rank], batch.num_tokens, *others[rank:]]
    sync = plan(
        batch, counts, dp_rank=rank, attn_tp_size=attn_tp, is_extend_in_batch=extending,
        graph=graph,
    )  # fmt: skip
    padded = pad(batch, sync)
    padded.check()
    assert padded.num_tokens % attn_tp == 0
    assert sync.start + sync.num_tokens <= sync.padding.buffer_len
    expected, got = fake_output(batch), unpad(fake_output(padded), sync)
    assert torch.equal(got.next_token_logits, expected.next_token_logits)
    assert (got.hidden_states is None) == (expected.hidden_states is None)
    if expected.hidden_states is not None:
        assert torch.equal(got.hidden_states, expected.hidden_states)
