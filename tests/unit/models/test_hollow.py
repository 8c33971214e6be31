# SPDX-License-Identifier: Apache-2.0
"""Hollow models have the shapes of full ones, none of the memory, and pass NaN row by row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from bedplate.models.hollow import HollowProducts, hollow_model, is_hollow
from bedplate.testing.tiny_models import family


def bytes_of(model):
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def test_a_large_model_takes_almost_no_memory():
    config = transformers.LlamaConfig(num_hidden_layers=2)
    model = hollow_model(transformers.LlamaForCausalLM, config)
    assert sum(p.numel() for p in model.parameters()) > 600e6
    assert bytes_of(model) < 200e3
    assert not model.training


def test_parameters_have_the_full_models_names_and_shapes():
    model_class, config = family("qwen3_moe")
    hollow, full = hollow_model(model_class, config), model_class(config)
    assert {n: p.shape for n, p in hollow.named_parameters()} == {
        n: p.shape for n, p in full.named_parameters()
    }


def test_buffers_are_real():
    model_class, config = family("llama")
    rotary = hollow_model(model_class, config).model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, model_class(config).model.rotary_emb.inv_freq)


def test_tied_parameters_stay_one():
    model_class, config = family("llama")
    config.tie_word_embeddings = True
    model = hollow_model(model_class, config)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.ones(()).expand(4, 4), True),
        (torch.ones(()).expand(4, 4).T, True),
        (torch.ones(4, 4), False),
        (torch.ones(4, 4)[:, :1], False),
        (torch.empty(4, 4, device="meta"), False),
        (3, False),
    ],
)
def test_is_hollow(value, expected):
    assert is_hollow(value) is expected


HOLLOW = torch.ones(()).expand(6, 4)


@pytest.mark.parametrize(
    ("product", "shape"),
    [
        (lambda x: F.linear(x, HOLLOW), (1, 3, 6)),
        (lambda x: x @ HOLLOW.T, (1, 3, 6)),
        (lambda x: torch.einsum("bth,oh->bto", x, HOLLOW), (1, 3, 6)),
    ],
    ids=["linear", "matmul", "einsum"],
)
def test_products_keep_shape_and_rows(product, shape):
    x = torch.ones(1, 3, 4)
    x[0, 1, 2] = float("nan")
    with HollowProducts():
        out = product(x)
    assert out.shape == shape
    assert out.isnan().any(-1)[0].tolist() == [False, True, False]


def test_a_product_whose_rows_do_not_correspond_is_spoiled_as_a_whole():
    x = torch.ones(4, 3)
    x[2, 1] = float("nan")
    with HollowProducts():
        assert torch.mm(HOLLOW, x).isnan().all()
        assert not torch.mm(HOLLOW, torch.ones(4, 3)).isnan().any()


def test_products_of_real_tensors_are_computed():
    a, b = torch.rand(2, 3), torch.rand(3, 2)
    with HollowProducts():
        torch.testing.assert_close(a @ b, (a.double() @ b.double()).float())


def test_building_restores_the_module_class():
    before = nn.Module.register_parameter
    with pytest.raises(ZeroDivisionError):
        hollow_model(lambda config: 1 // 0, None)
    assert nn.Module.register_parameter is before
