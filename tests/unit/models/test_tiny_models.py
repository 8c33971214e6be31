# SPDX-License-Identifier: Apache-2.0
"""Tiny models are small, repeatable, and spread their logits."""

from __future__ import annotations

import pytest
import torch
import transformers

from bedplate.testing.tiny_models import (
    FAMILIES,
    WINDOW_TOKENS,
    family,
    fill_weights,
    tiny_config,
    tiny_model,
)

# Upstream quirk (transformers 5.17): some modeling files use torch.jit.script when imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_small(name):
    model = tiny_model(*family(name))
    assert sum(p.numel() for p in model.parameters()) < 1e6
    assert model.config.vocab_size == 160


def test_the_same_seed_gives_the_same_weights():
    first, second, other = (tiny_model(*family("qwen3"), seed=seed) for seed in (0, 0, 1))
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_spread_of_weights():
    model = tiny_model(*family("llama"))
    matrix = model.model.layers[0].mlp.up_proj.weight
    assert matrix.std().item() == pytest.approx(0.15, abs=0.01)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1.0, abs=0.05)
    assert model.model.norm.weight.mean().item() == pytest.approx(1.0, abs=0.05)


def test_vectors_stay_near_zero_where_zero_is_neutral():
    module = torch.nn.LayerNorm(64)
    fill_weights(module)
    assert module.bias.abs().max() < 0.5
    assert (module.weight - 1).abs().max() < 0.5


def test_a_feature_that_is_off_by_default_stays_off():
    assert tiny_config(transformers.MixtralConfig).sliding_window is None
    assert tiny_config(transformers.MistralConfig).sliding_window == WINDOW_TOKENS


def test_parts_of_a_composite_are_shrunk():
    config = tiny_config(transformers.Llama4Config)
    assert config.text_config.hidden_size == 64
    assert config.vision_config.num_hidden_layers == 4


def test_overrides_come_last():
    assert tiny_config(transformers.LlamaConfig, {"hidden_size": 32}).hidden_size == 32
