# SPDX-License-Identifier: Apache-2.0
"""Prompts and seeds."""

from __future__ import annotations

import numpy as np
import pytest

from bedplate.engine.admission import draw_seed, prompt_tokens
from bedplate.errors import ConfigError


class Codec:
    def encode(self, text):
        return [len(word) for word in text.split()]


@pytest.mark.parametrize("prompt", ["a bb ccc", [1, 2, 3], (1, 2, 3), np.array([1, 2, 3])])
def test_what_can_be_a_prompt(prompt):
    tokens = prompt_tokens(prompt, Codec(), 10)
    assert tokens.tolist() == [1, 2, 3]
    assert tokens.dtype == np.int32


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "at least one token"),
        ([], "at least one token"),
        ([[1], [2]], "at least one token"),
        ([[1] * 100], "…"),
        ([1.5], "float64"),
        ([1, -1, 10], "2 token ids .* outside 0…9, for instance -1"),
    ],
)
def test_what_cannot(prompt, message):
    with pytest.raises(ConfigError, match=message):
        prompt_tokens(prompt, Codec(), 10)


def test_text_needs_a_tokenizer():
    with pytest.raises(ConfigError, match="token ids"):
        prompt_tokens("a", None, None)


def test_ids_beyond_int32_are_refused_even_without_a_vocabulary():
    with pytest.raises(ConfigError, match="outside"):
        prompt_tokens([2**31], None, None)


def test_seeds_are_repeatable_scattered_and_in_range():
    seeds = [draw_seed(0, n) for n in range(1000)] + [draw_seed(1, n) for n in range(1000)]
    assert len(set(seeds)) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert np.mean([seed >> 62 for seed in seeds]) == pytest.approx(0.5, abs=0.05)
    assert draw_seed(7, 3) == draw_seed(7, 3)
