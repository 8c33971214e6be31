# SPDX-License-Identifier: Apache-2.0
"""A malformed batch is refused with every field that is wrong."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from bedplate.batch.forward_batch import ExtendPart, ForwardBatch, pad_tokens
from bedplate.batch.forward_mode import ForwardMode
from bedplate.errors import ContractError


def a_batch(size=3, mode=ForwardMode.DECODE):
    wide, narrow = torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.int32)
    return ForwardBatch(
        mode=mode, batch_size=size, input_ids=wide, positions=wide, req_pool_indices=narrow,
        seq_lens=narrow, seq_lens_cpu=narrow, out_cache_loc=narrow,
    )  # fmt: skip


def test_a_good_batch_passes():
    a_batch().check()
    a_batch(0, ForwardMode.IDLE).check()
    narrow = torch.ones(3, dtype=torch.int32)
    part = ExtendPart(
        seq_lens=narrow, prefix_lens=narrow, start_loc=narrow, seq_lens_cpu=narrow,
        prefix_lens_cpu=narrow,
    )  # fmt: skip
    replace(a_batch(mode=ForwardMode.EXTEND), extend=part).check()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input_ids": torch.zeros(3)}, "input_ids is float32, expected int64"),
        ({"seq_lens": torch.ones(3, dtype=torch.int64)}, "seq_lens is int64"),
        ({"out_cache_loc": torch.zeros(3)}, "int32 or int64"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, "positions has 2 rows, expected 3"),
        ({"seq_lens": torch.ones(2, dtype=torch.int32)}, "seq_lens has 2 rows"),
        ({"batch_size": 2}, "3 tokens for 2 requests"),
        ({"mode": ForwardMode.MIXED}, "MIXED without its extend part"),
        ({"logits_rows": torch.ones(1)}, "logits_rows"),
        ({"seq_lens_cpu": torch.ones(3, dtype=torch.int32, device="meta")}, "not on the host"),
    ],
)
def test_every_fault_is_named(changes, said):
    with pytest.raises(ContractError, match=said):
        replace(a_batch(), **changes).check()


def test_all_faults_are_named_together():
    with pytest.raises(ContractError, match=r"input_ids.*seq_lens has 2"):
        replace(
            a_batch(), input_ids=torch.zeros(3), seq_lens=torch.ones(2, dtype=torch.int32)
        ).check()


def test_it_stays_small():
    """A new field needs two unrelated models and two backends that read it."""
    assert len(fields(ForwardBatch)) <= 16


def test_padding_follows_the_tokens_and_belongs_to_nobody():
    batch = replace(a_batch(mode=ForwardMode.EXTEND), input_ids=torch.arange(5, 8))
    padded = pad_tokens(batch, 5)
    assert padded.input_ids.tolist() == [5, 6, 7, 0, 0]
    assert padded.positions.tolist() == [0] * 5
    assert padded.out_cache_loc.tolist() == [1, 1, 1, 0, 0]
    assert (padded.batch_size, padded.num_tokens) == (3, 5)
    assert pad_tokens(batch, 3) is pad_tokens(batch, 2) is batch
