# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from bedplate.models.mask_probe import MaskFacts, UnreadableMaskError, ask_mask


def test_plain_causal_mask():
    assert ask_mask(causal_mask_function) == MaskFacts(causal=True)


def test_bidirectional_mask():
    assert ask_mask(bidirectional_mask_function) == MaskFacts(causal=False)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200_000))
def test_window_of_any_size(window):
    facts = ask_mask(sliding_window_causal_mask_function(window))
    assert facts == MaskFacts(causal=True, window=window)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 200_000))
def test_chunk_of_any_size(chunk):
    facts = ask_mask(chunked_causal_mask_function(chunk, torch.zeros(1, dtype=torch.int64)))
    assert facts == MaskFacts(causal=True, chunk=chunk)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 64), st.integers(0, 300), st.integers(0, 300))
def test_facts_say_what_the_closure_says(window, query, key):
    closure = sliding_window_causal_mask_function(window)
    zero = torch.tensor(0)
    expected = bool(closure(zero, zero, torch.tensor(query), torch.tensor(key)))
    assert MaskFacts(causal=True, window=window).visible(query, key) == expected


@pytest.mark.parametrize(
    "closure",
    [
        lambda b, h, q, k: (k <= q) & (k % 2 == 0),  # strided
        lambda b, h, q, k: (k <= q) & ((k > q - 8) | (k < 4)),  # window and anchored start
        lambda b, h, q, k: (k <= q) & (k < 100),  # fixed prefix
    ],
    ids=["strided", "anchored", "prefix"],
)
def test_masks_of_another_kind_are_not_described(closure):
    with pytest.raises(UnreadableMaskError):
        ask_mask(closure)


def test_a_closure_that_indexes_real_data_is_not_described():
    blocks = torch.zeros(1, 16)
    with pytest.raises(UnreadableMaskError, match="IndexError"):
        ask_mask(lambda b, h, q, k: blocks[b, q] == blocks[b, k])
