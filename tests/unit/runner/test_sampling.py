# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of choosing tokens, against definitions and against transformers' filters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bedplate.batch.forward_mode import ForwardMode
from bedplate.batch.schedule_batch import ScheduleBatch
from bedplate.errors import ConfigError
from bedplate.reference.sampling import (
    NOT_A_NUMBER,
    FilterParams,
    filter_sorted,
    logprobs_of,
    sample_filtered,
    sample_greedy,
    sample_plain,
    uniform,
)
from bedplate.runner.sampler import Sampler
from bedplate.runner.sampling_params import SamplingParams

V18 = torch.tensor([[0.5, 0.3, 0.15, 0.05]])


def filters(top_k=4, top_p=1.0, min_p=0.0):
    return FilterParams(
        top_k=torch.tensor([top_k]), top_p=torch.tensor([top_p]), min_p=torch.tensor([min_p])
    )


@pytest.mark.parametrize(
    ("settings_", "kept"),
    [
        ({"top_k": 3, "top_p": 0.7}, 2),  # V18: exclusive sums 0, .5, .8
        ({"min_p": 0.5}, 2),  # V18: threshold 0.25
        ({"top_k": 1}, 1),
        ({"top_p": 0.5}, 1),  # the first token alone reaches it
        ({"top_p": 1e-6}, 1),
        ({"min_p": 1.0}, 1),
        ({}, 4),
    ],
)
def test_filters_keep_the_most_likely_tokens(settings_, kept):
    result = filter_sorted(V18, filters(**settings_))
    torch.testing.assert_close(result[0, :kept], V18[0, :kept])
    assert not result[0, kept:].any()


@given(
    top_k=st.integers(1, 40),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.9),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_filters_agree_with_transformers(top_k, top_p, min_p, seed):
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed)) * 3
    probs = torch.softmax(logits, -1)
    ordered, order = probs.sort(dim=-1, descending=True)
    for name, ours, theirs in (
        ("top_k", filters(top_k=top_k), TopKLogitsWarper(top_k)),
        ("top_p", filters(40, top_p=top_p), TopPLogitsWarper(top_p)),
        ("min_p", filters(40, min_p=min_p), MinPLogitsWarper(min_p)),
    ):
        kept = filter_sorted(ordered, ours) > 0
        expected = theirs(None, logits).isfinite().gather(-1, order)
        # Sums that meet the threshold to the last bit may round either way.
        assert (kept != expected).sum() <= (1 if name == "top_p" else 0), name


def test_greedy_takes_the_first_of_equals_and_marks_bad_rows():
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, float("nan"), 1.0]])
    assert sample_greedy(logits).tolist() == [1, NOT_A_NUMBER]


@pytest.mark.parametrize("filtered", [False, True])
def test_frequencies_follow_the_distribution(filtered):
    logits = V18.log().expand(20_000, 4)
    count = logits.shape[0]
    u = torch.from_numpy(
        uniform(np.full(count, 5, np.uint64), np.arange(count, dtype=np.int64))
    )
    temperature = torch.ones(count)
    if filtered:
        params = FilterParams(
            top_k=torch.full((count,), 2), top_p=torch.ones(count), min_p=torch.zeros(count)
        )
        tokens, expected = sample_filtered(logits, temperature, u, params), [0.625, 0.375, 0, 0]
    else:
        tokens, expected = sample_plain(logits, temperature, u), V18[0].tolist()
    seen = torch.bincount(tokens, minlength=4) / count
    torch.testing.assert_close(seen, torch.tensor(expected), atol=0.015, rtol=0)


def test_a_number_at_the_very_end_never_picks_an_impossible_token():
    logits = torch.tensor([[0.0, 0.0, float("-inf")]])
    u = torch.tensor([np.nextafter(np.float32(1), np.float32(0))])
    assert sample_plain(logits, torch.ones(1), u).item() == 1


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_uniform_is_in_range_and_depends_on_both(seed, position):
    def draw(s, p):
        return float(uniform(np.array([s], np.uint64), np.array([p], np.int64))[0])

    assert 0.0 <= draw(seed, position) < 1.0
    assert draw(seed, position) == draw(seed, position)
    others = [draw(seed, position + i) for i in range(1, 9)]
    others += [draw(seed ^ (1 << i), position) for i in range(8)]
    assert len(set(others)) > 12


def test_uniform_numbers_of_neighbours_are_unrelated():
    grid = uniform(
        np.repeat(np.arange(300, dtype=np.uint64), 300), np.tile(np.arange(300), 300)
    ).reshape(300, 300)
    assert abs(grid.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02


def test_logprobs_are_those_of_the_unfiltered_distribution():
    own, best, ids = logprobs_of(V18.log() + 7.0, torch.tensor([2]), 2)
    torch.testing.assert_close(own.exp(), torch.tensor([0.15]))
    torch.testing.assert_close(best.exp(), torch.tensor([[0.5, 0.3]]))
    assert ids.tolist() == [[0, 1]]


def decode(rows, lengths):
    size = len(rows)
    zeros = np.zeros(size, np.int64)
    return ScheduleBatch(
        mode=ForwardMode.DECODE,
        req_pool_indices=np.array(rows, np.int32),
        seq_lens=np.array(lengths, np.int32),
        input_ids=zeros,
        positions=zeros,
        out_cache_loc=np.ones(size, np.int32),
    )


def sampler(**rows):
    made = Sampler(8, (3,), torch.device("cpu"))
    for row, params in rows.items():
        made.set_request(int(row[1:]), params, prompt_len=4)
    return made


ROW_PARAMS = {
    "r1": SamplingParams(),
    "r2": SamplingParams(temperature=1.0, seed=11),
    "r3": SamplingParams(temperature=0.7, seed=12, top_k=3),
    "r4": SamplingParams(temperature=1.3, seed=13, top_p=0.8, min_p=0.05),
}


def test_a_requests_token_does_not_depend_on_the_rest_of_the_batch():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)) * 2
    made = sampler(**ROW_PARAMS)
    rows, lengths = [1, 2, 3, 4], [9, 5, 30, 7]
    together = made.sample(logits, decode(rows, lengths), np.arange(4))
    for i in range(4):
        alone = made.sample(
            logits[i : i + 1], decode(rows[i : i + 1], lengths[i : i + 1]), np.arange(1)
        )
        assert alone.item() == together[i].item()
    swapped = [3, 0, 2, 1]
    again = made.sample(
        logits[swapped],
        decode([rows[i] for i in swapped], [lengths[i] for i in swapped]),
        np.arange(4),
    )
    assert again.tolist() == together[swapped].tolist()


def test_end_tokens_are_impossible_before_min_tokens():
    logits = torch.zeros(1, 5)
    logits[0, 3], logits[0, 2] = 9.0, 8.0
    made = sampler(r1=SamplingParams(min_tokens=2, stop_token_ids=(2,)))
    chosen = [
        made.sample(logits, decode([1], [length]), np.arange(1)).item() for length in (4, 5, 6)
    ]
    assert chosen[0] not in (2, 3)
    assert chosen[1] not in (2, 3)
    assert chosen[2] == 3
    assert logits[0, 3] == 9.0, "the model's logits must stay as they are"


def test_a_row_forgets_its_previous_request():
    made = sampler(r1=SamplingParams(min_tokens=50, temperature=1.0, seed=1))
    made.set_request(1, SamplingParams(), prompt_len=4)
    logits = torch.zeros(1, 5)
    logits[0, 3] = 1.0
    assert made.sample(logits, decode([1], [5]), np.arange(1)).item() == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"temperature": -0.1},
        {"temperature": 101},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"seed": -1},
        {"stop": ("",)},
        {"logprobs": 65},
        {"prompt_logprobs": -1},
        {"min_tokens": 5, "max_tokens": 4},
    ],
)
def test_wrong_settings_are_refused_with_their_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize("given_", ["END", ["END"], ("END",)], ids=["text", "list", "tuple"])
def test_stop_takes_one_text_or_several(given_):
    assert SamplingParams(stop=given_).stop == ("END",)
    assert SamplingParams(stop_token_ids=[4]).stop_token_ids == (4,)
