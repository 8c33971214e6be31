# SPDX-License-Identifier: Apache-2.0
"""From bytes to tokens: vectors V12, V12b, V13 and functions 78–80."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bedplate.contract.attention import AttentionCallSpec
from bedplate.errors import ConfigError, DeviceMemoryError
from bedplate.memory.sizing import (
    HybridTokens,
    cell_bytes,
    default_max_requests,
    default_mem_fraction,
    kv_heads_per_rank,
    mha_cell_bytes,
    mla_cell_bytes,
    profile_max_num_tokens,
    require_capacity,
    speculative_num_tokens,
    split_hybrid,
    split_hybrid_chunked,
)

GIB = 1 << 30


def call(i=0, kv_heads=8, head_dim=128, value_dim=128, **rest):
    return AttentionCallSpec(
        call_id=i, module=f"layers.{i}", num_heads=32, num_kv_heads=kv_heads,
        head_dim=head_dim, value_dim=value_dim, scale=1.0, **rest,
    )  # fmt: skip


@pytest.mark.parametrize(("cell", "tokens"), [(131072, 413859), (70272, 771935)])
def test_profiled_tokens(cell, tokens):
    """V12: 60 GiB free of 79 GiB before loading, fraction 0.88."""
    got = profile_max_num_tokens(
        free_bytes=60 * GIB, total_before_load_bytes=79 * GIB, mem_fraction=0.88, cell=cell
    )
    assert got == tokens


def test_profiled_tokens_may_be_negative():
    got = profile_max_num_tokens(
        free_bytes=GIB, total_before_load_bytes=79 * GIB, mem_fraction=0.88, cell=131072
    )
    assert got < 0


def test_cells_by_formula_and_by_observed_calls():
    """V12."""
    assert mha_cell_bytes(8, 128, 32, 2) == 131072
    assert cell_bytes([call(i) for i in range(32)], itemsize=2) == 131072
    latent = [
        call(i, kv_heads=1, head_dim=576, value_dim=512, value_in_key=True) for i in range(61)
    ]
    assert mla_cell_bytes(512, 64, 61, 2) == 70272
    assert cell_bytes(latent, itemsize=2) == 70272
    assert cell_bytes(latent, itemsize=2, attn_tp_size=8) == 70272


def test_aliases_store_nothing_and_head_sizes_may_be_mixed():
    calls = [
        call(0, kv_heads=2, head_dim=8, value_dim=4),
        call(1, kv_heads=2, head_dim=8, value_dim=4, alias_of=0),
        call(2, kv_heads=4, head_dim=16, value_dim=16),
    ]
    assert cell_bytes(calls, itemsize=1) == 2 * 12 + 4 * 32
    assert cell_bytes(calls, itemsize=4, attn_tp_size=2) == 4 * (12 + 2 * 32)


@pytest.mark.parametrize(
    ("heads", "ranks", "expected"), [(8, 1, 8), (8, 2, 4), (8, 8, 1), (2, 8, 1), (1, 3, 1)]
)
def test_heads_are_shared_or_replicated(heads, ranks, expected):
    assert kv_heads_per_rank(heads, ranks) == expected


@pytest.mark.parametrize(("heads", "ranks"), [(6, 4), (3, 2), (2, 3)])
def test_no_head_may_be_lost(heads, ranks):
    """The plain formula max(1, heads // ranks) would store too few."""
    with pytest.raises(ConfigError, match=f"{heads} key/value heads .* {ranks} ranks"):
        kv_heads_per_rank(heads, ranks)


@pytest.mark.parametrize(
    ("tokens", "context", "expected"),
    [(413859, 8192, 4096), (100000, 131072, 2048), (1000000, 131072, 3906)],
)
def test_default_request_rows(tokens, context, expected):
    """V12."""
    assert default_max_requests(tokens, context) == expected


def test_drafts_in_flight_get_room():
    """V12."""
    got = speculative_num_tokens(100000, max_requests=64, steps=3, topk=4, draft_tokens=16)
    assert got == 101892


@pytest.mark.parametrize(
    ("gib", "tp", "expected"),
    [(24, 1, 0.879), (80, 1, 0.875), (80, 8, 0.831), (141, 8, 0.887), (192, 1, 0.833)],
)
def test_default_fraction(gib, tp, expected):
    """V12b."""
    assert default_mem_fraction(gib * GIB, tp_size=tp) == expected


def test_default_fraction_keeps_room_for_what_else_runs():
    assert default_mem_fraction(None) == 0.88
    assert default_mem_fraction(192 * GIB, speculation=True) == round(158 / 192, 3)
    assert default_mem_fraction(192 * GIB, dp_attention=True) == round(156 / 192, 3)
    assert default_mem_fraction(80 * GIB, tp_size=4, pp_size=2) == 0.831


def test_a_device_smaller_than_the_reserve_is_refused_with_the_numbers():
    with pytest.raises(DeviceMemoryError, match=r"2\.0 GiB.*2\.9 GiB") as caught:
        default_mem_fraction(2 * GIB)
    assert caught.value.facts["free"] == 2 * GIB
    assert "mem_fraction" in str(caught.value.facts["settings"])


def test_hybrid_split():
    """V13."""
    got = split_hybrid(10000, full_layers=8, window_layers=40)
    assert got == HybridTokens(full=12000, window=9600)
    paged = split_hybrid(10001, full_layers=8, window_layers=40, page_size=64)
    assert paged == HybridTokens(full=11968, window=9600)


@pytest.mark.parametrize(
    ("ratio", "window", "full"), [(1, 3053, 390840), (0.5, 80248, 159254), (0, 100000, 100000)]
)
def test_hybrid_split_with_chunks(ratio, window, full):
    """V13."""
    got = split_hybrid_chunked(100_000, chunk=8192, context_len=1_048_576, ratio=ratio)
    assert got == HybridTokens(full=full, window=window)


def test_hybrid_split_with_chunks_is_floored_to_pages():
    got = split_hybrid_chunked(
        100_000, chunk=8192, context_len=1_048_576, ratio=1, page_size=16
    )
    assert got == HybridTokens(full=390832, window=3040)


@pytest.mark.parametrize(("full", "window", "ratio"), [(0, 4, 0), (0, 0, 0.8), (9, 4, -0.1)])
def test_impossible_hybrid_splits_are_refused(full, window, ratio):
    with pytest.raises(ConfigError, match=f"{full} full and {window} window"):
        split_hybrid(100, full_layers=full, window_layers=window, ratio=ratio)


@given(
    st.integers(0, 10**7),
    st.integers(1, 90),
    st.integers(0, 90),
    st.sampled_from([0.1, 0.8, 1]),
)
def test_hybrid_split_stays_within_the_budget(tokens, full, window, ratio):
    got = split_hybrid(tokens, full_layers=full, window_layers=window, ratio=ratio)
    used = got.full * full + got.window * window
    budget = tokens * (full + window)
    assert used <= budget
    assert used > budget - 2 * (full + window) - 1


def test_capacity_is_floored_to_pages():
    assert require_capacity(1000, cell=4, free_bytes=0, page_size=128) == 896
    assert require_capacity(1, cell=4, free_bytes=0) == 1


@pytest.mark.parametrize("tokens", [127, 0, -5])
def test_no_room_is_refused_with_asked_free_and_remedies(tokens):
    with pytest.raises(DeviceMemoryError, match=f"{tokens} tokens fit") as caught:
        require_capacity(tokens, cell=4, free_bytes=300, page_size=128)
    assert caught.value.facts == {
        "asked": 512,
        "free": 300,
        "settings": ("mem_fraction", "max_batch_size", "kv_dtype"),
    }
