# SPDX-License-Identifier: Apache-2.0
"""Absorbing the expansion is the expansion, for the modules of every family that has one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bedplate.models import latent
from bedplate.testing.tiny_models import family, tiny_model

# Upstream quirk (transformers 5.17): some modeling files use torch.jit.script when imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

HEADS, NOPE, ROPE, RANK, VALUE = 4, 16, 8, 32, 12
LATENT_FAMILIES = ("deepseek_v2", "deepseek_v3", "minicpm3", "glm4_moe_lite", "longcat_flash")


def a_module(model_type="deepseek_v3"):
    model = tiny_model(*family(model_type))
    return next(iter(latent.latent_modules(model).values()))


@pytest.mark.parametrize("model_type", LATENT_FAMILIES)
def test_every_family_of_list_b_absorbs(model_type):
    module = a_module(model_type)
    before = module.kv_b_proj.weight
    assert latent.absorbs(module, HEADS, NOPE, ROPE)
    assert module.kv_b_proj.weight is before


def test_another_expansion_is_noticed():
    module = a_module()

    class Swapped(type(module)):
        def expand_kv(self, kv_nope, k_rot):
            key, value = super().expand_kv(kv_nope, k_rot)
            return key.flip(-1), value

    module.__class__ = Swapped
    assert not latent.absorbs(module, HEADS, NOPE, ROPE)


def test_one_head_against_the_latent_is_the_expanded_attention():
    """The whole identity, with scores, softmax and values, in float64."""
    module = a_module().double()
    tokens = 7
    latents = torch.randn(1, 1, tokens, RANK, dtype=torch.float64)
    rope = torch.randn(1, 1, tokens, ROPE, dtype=torch.float64)
    query = torch.randn(tokens, HEADS, NOPE + ROPE, dtype=torch.float64)
    key, value = module.expand_kv(latents, rope)
    scores = torch.einsum("nhd,hld->hnl", query, key[0]).softmax(-1)
    expected = torch.einsum("hnl,hld->nhd", scores, value[0])

    stored = latent.latent_keys(latents[0].transpose(0, 1), rope[0].transpose(0, 1))
    assert stored.shape == (tokens, 1, RANK + ROPE)
    absorbed = latent.absorb(module, query, ROPE)
    scores = torch.einsum("nhd,ld->hnl", absorbed, stored[:, 0]).softmax(-1)
    attended = torch.einsum("hnl,ld->nhd", scores, stored[:, 0, :RANK])
    ours = latent.expand(module, attended, NOPE)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_a_changed_weight_needs_no_refresh():
    module = a_module()
    query = torch.randn(2, HEADS, NOPE + ROPE)
    before = latent.absorb(module, query, ROPE)
    module.kv_b_proj.weight.mul_(2)
    torch.testing.assert_close(
        latent.absorb(module, query, ROPE)[..., :RANK], 2 * before[..., :RANK]
    )


def test_the_method_is_shadowed_on_the_instance_only():
    module, other = a_module(), a_module()
    latent.keep_latent(module)
    pair = torch.zeros(1, 1, 2, RANK), torch.zeros(1, 1, 2, ROPE)
    assert module.expand_kv(*pair) == pair
    assert (latent.is_kept(module), latent.is_kept(other)) == (True, False)
    assert other.expand_kv(*pair)[0].shape == (1, HEADS, 2, NOPE + ROPE)
    assert latent.value_size(module, HEADS, NOPE) == VALUE


def test_an_expansion_with_a_bias_is_left_alone():
    module = a_module()
    module.kv_b_proj = nn.Linear(RANK, HEADS * (NOPE + VALUE), bias=True)
    assert latent.latent_modules(module) == {}
