# SPDX-License-Identifier: Apache-2.0
"""Every certified family gives transformers' logits and tokens, packed, paged and chunked."""

from __future__ import annotations

import dataclasses

import pytest
import transformers
from tests.integration.parity.story import run_story

from bedplate.models.probe import probe
from bedplate.testing.tiny_models import (
    FAMILIES,
    SWEEP_OVERRIDES,
    WINDOW_TOKENS,
    family,
    tiny_config,
    tiny_model,
)

# Upstream quirk (transformers 5.17): some modeling files use torch.jit.script when imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

LIST_A, LIST_B = 32, 5
LATENT = {"deepseek_v2", "deepseek_v3", "minicpm3", "glm4_moe_lite", "longcat_flash"}
WINDOWED = {
    "qwen2",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "phi3",
    "olmo3",
    "cohere2",
    "exaone4",
    "starcoder2",
    "gpt_oss",
    "mixtral",
    "qwen2_moe",
    "phimoe",
    "llama4_text",
}


def _story(name, **options):
    model_class, config = family(name)
    spec = probe(model_class, config)
    module = tiny_model(model_class, config)
    return spec, *run_story(module, spec, vocab_size=config.vocab_size, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_has_the_oracles_logits_and_tokens(name):
    spec, rig, sequences = _story(name)
    worst = rig.check(*sequences)
    assert worst <= 1e-4
    # A choice may differ only where the oracle itself is undecided by less than the error.
    assert [d for d in rig.disagreements(*sequences) if d[2] > 2 * worst] == []
    assert rig.spread(*sequences) > 0.1, "logits that hardly differ prove nothing"
    if name in WINDOWED:
        assert any((c.window or c.chunk) == WINDOW_TOKENS for c in spec.calls)
    assert (name in LATENT) == all(c.value_in_key for c in spec.calls)


@pytest.mark.parametrize("name", ["Bart", "Roberta", "DiffLlama", "Gemma3n"])
def test_classes_with_seams_of_their_own(name):
    """Own count of positions, an offset, two calls in a module, two caches per layer type."""
    model_class = getattr(transformers, f"{name}ForCausalLM")
    config_class = model_class.config_class
    overrides = SWEEP_OVERRIDES.get(config_class.model_type)
    config = tiny_config(config_class, overrides)
    spec = probe(model_class, config)
    rig, sequences = run_story(tiny_model(model_class, config), spec, vocab_size=160)
    assert rig.check(*sequences) <= 1e-4


def test_both_lists_are_whole():
    assert len(FAMILIES) == LIST_A + LIST_B


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("name", FAMILIES)
def test_family_with_other_prompts_and_more_steps(name, seed):
    _, rig, sequences = _story(name, seed=seed, decode_steps=12)
    assert rig.check(*sequences) <= 1e-4


def test_a_wrong_window_would_be_noticed():
    """The scenario's power: the same run with the window left out must fail."""
    model_class, config = family("mistral")
    spec = probe(model_class, config)
    calls = tuple(dataclasses.replace(call, window=None) for call in spec.calls)
    module = tiny_model(model_class, config)
    wrong = dataclasses.replace(spec, calls=calls)
    rig, sequences = run_story(module, wrong, vocab_size=config.vocab_size, check=False)
    assert rig.check(*sequences) > 1e-2
