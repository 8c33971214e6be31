# SPDX-License-Identifier: Apache-2.0
"""Small real models and their checkpoint folders."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

if TYPE_CHECKING:
    from pathlib import Path

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
CONFIGS = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "tied": (Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}


def make_config(kind="llama", **overrides):
    config_class, extra = CONFIGS[kind]
    return config_class(**{**SIZES, **extra, **overrides})


def make_model(kind="llama", *, seed=0, dtype=torch.float32, **overrides):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(kind, **overrides), dtype=dtype)
    return model.eval().requires_grad_(False)


@pytest.fixture
def checkpoint(tmp_path: Path):
    """``checkpoint(kind, seed=…)`` → (model, folder that holds it)."""

    def write(kind="llama", *, seed=0, shard=None, name=None, **overrides):
        model = make_model(kind, seed=seed, **overrides)
        folder = tmp_path / (name or f"{kind}-{seed}")
        model.save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))
        return model, folder

    return write


@pytest.fixture
def model_of():
    return make_model


@pytest.fixture
def config_of():
    return make_config


@pytest.fixture
def logits():
    ids = torch.arange(1, 13)[None]

    def of(model):
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    return of


@pytest.fixture
def bits():
    """State of a module or index as copies, for comparing bit for bit."""

    def of(holder):
        module = getattr(holder, "module", holder)
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}

    return of
