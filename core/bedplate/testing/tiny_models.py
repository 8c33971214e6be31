# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of any family, for parity tests.

A configuration class is shrunk by setting every size that it knows by a usual name.  Weights
are drawn so that logits spread (standard deviation 0.15, embeddings 1.0): with the usual
initialisation greedy choices are near-ties and token comparisons mean nothing.

Windows and chunks become 8 tokens, shorter than the prompts of the tests.
"""

from __future__ import annotations

__all__ = [
    "FAMILIES",
    "SWEEP_OVERRIDES",
    "TINY_SIZES",
    "family",
    "fill_weights",
    "tiny_config",
    "tiny_model",
]

import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bedplate.models import transformers_api as hf

if TYPE_CHECKING:
    from collections.abc import Mapping

VOCAB_SIZE = 160
WINDOW_TOKENS = 8

TINY_SIZES: Mapping[str, Any] = {
    # Width and depth.
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "embedding_size"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "dim", "hidden_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "d_ff", "ffn_dim"), 96),
    **dict.fromkeys(("n_inner", "ffn_hidden_size", "feed_forward_proj_dim"), 96),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), 4),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 96),
    "encoder_layers": 1,
    # Heads.
    **dict.fromkeys(("decoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv"), 16),
    "is_decoder": True, "rotary_dim": 8,
    # Latent attention.
    "q_lora_rank": 24, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "qk_head_dim": 24, "v_head_dim": 12,
    # Visibility.
    "sliding_window": WINDOW_TOKENS, "attention_chunk_size": WINDOW_TOKENS,
    # Experts.
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("expert_ffn_hidden_size", "expert_ffn_size"), 48),
    **dict.fromkeys(("n_routed_experts", "num_experts"), 8),
    **dict.fromkeys(("num_local_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    # Vocabulary.
    "vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 512),
}  # fmt: skip
"""Size by name of the field; a configuration takes those that it has."""

_FEATURES = {"sliding_window", "attention_chunk_size", "q_lora_rank", "n_inner"}
"""What a family that leaves it out by default goes on to leave out."""

_SLIDING = ("sliding_attention", "full_attention")

_SCALED_QUERIES = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 64.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.4,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
"""Queries that grow with the position, from 8 tokens on."""

_HALF_SLIDING = {"use_sliding_window": True, "max_window_layers": 2}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    # List A of the design: these block a release.
    "llama": {},
    "qwen2": _HALF_SLIDING | {"sliding_window": WINDOW_TOKENS},
    "qwen3": {},
    "mistral": {},
    "ministral3": {"rope_parameters": _SCALED_QUERIES},
    "gemma2": {"query_pre_attn_scalar": 24},
    "gemma3_text": {"layer_types": _SLIDING * 2},
    "gemma4_text": {
        "layer_types": _SLIDING * 2, "num_kv_shared_layers": 2, "global_head_dim": 32,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE,
    },
    "phi3": {"sliding_window": WINDOW_TOKENS},
    "phi": {},
    "olmo2": {},
    "olmo3": {"layer_types": _SLIDING * 2},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.7},
    "smollm3": {},
    "glm4": {},
    "cohere2": {"layer_types": _SLIDING * 2},
    "exaone4": {"layer_types": _SLIDING * 2},
    "starcoder2": {"sliding_window": WINDOW_TOKENS},
    "stablelm": {},
    "nemotron": {},
    "gpt_neox": {},
    "gpt2": {},
    "opt": {},
    "gpt_oss": {"layer_types": _SLIDING * 2},
    "mixtral": {"sliding_window": WINDOW_TOKENS},
    "qwen2_moe": _HALF_SLIDING,
    "qwen3_moe": {},
    "glm4_moe": {},
    "ernie4_5_moe": {},
    "phimoe": {"sliding_window": WINDOW_TOKENS},
    "llama4_text": {"floor_scale": 4, "attn_scale": 0.4},  # scales queries by position
    "minimax_m2": {},
    # List B: latent attention.
    "deepseek_v2": {},
    "deepseek_v3": {},
    "minicpm3": {},
    "glm4_moe_lite": {},
    "longcat_flash": {"zero_expert_num": 2},
}  # fmt: skip
"""Certified families, with what each needs beside ``TINY_SIZES``."""

SWEEP_OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {
        "layer_types": _SLIDING * 2, "num_kv_shared_layers": 2, "laurel_rank": 8,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE,
        "activation_sparsity_pattern": (0.0,) * 4,
    },
    # Their defaults have none of the layers that real checkpoints have.
    "lfm2": {"layer_types": ("conv", "full_attention") * 2},
    "lfm2_moe": {"layer_types": ("conv", "full_attention") * 2},
    "minimax_m3_vl_text": {"layer_types": ("full_attention", "minimax_m3_sparse") * 2},
}  # fmt: skip
"""What other families need for the sweep over all classes."""


def tiny_config(config_class: type[Any], overrides: Mapping[str, Any] | None = None) -> Any:
    """A small configuration of ``config_class``, its sub-configurations shrunk likewise.

    Args:
        config_class: Any configuration class of transformers.
        overrides: Fields to set on top.
    """
    return config_class(**_tiny_fields(config_class, overrides or {}))


def _tiny_fields(config_class: type[Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    default = config_class()
    fields = {k: v for k, v in TINY_SIZES.items() if k in default.__dict__}
    for name in getattr(config_class, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None:
            fields[name] = _tiny_fields(type(part), {}) | {"model_type": part.model_type}
    fields = {
        k: v for k, v in fields.items() if k not in _FEATURES or default.__dict__[k] is not None
    }
    if "kv_lora_rank" in fields:  # every head expands the one latent
        own = {"num_key_value_heads": 4, "head_dim": 8}
        fields |= {k: v for k, v in own.items() if k in fields}
    return fields | {k: list(v) if isinstance(v, tuple) else v for k, v in overrides.items()}


def tiny_model(
    model_class: type[Any], config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Any:
    """``model_class(config)`` on the host with random weights, in evaluation mode."""
    model = model_class(config).to(dtype).eval().requires_grad_(False)
    fill_weights(model, seed=seed)
    return model


@torch.no_grad()
def fill_weights(model: nn.Module, *, seed: int = 0) -> None:
    """Draw every parameter anew, each from a seed of its own name.

    Matrices have standard deviation 0.15, embeddings 1.0; vectors stay near their kind's
    neutral value: 1 for those that transformers initialises to 1, else 0.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        chance = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        noise = torch.randn(parameter.shape, generator=chance).to(parameter.dtype)
        if parameter.ndim < 2:
            neutral = parameter.mean().round().clamp(0, 1) if parameter.isfinite().all() else 1
            parameter.copy_(neutral + 0.1 * noise)
        else:
            parameter.copy_(noise * (1.0 if id(parameter) in embeddings else 0.15))


def family(model_type: str) -> tuple[type[Any], Any]:
    """The causal-LM class and a tiny configuration of a certified family."""
    config_class = hf.causal_lm_config_class(model_type)
    classes = dict(hf.causal_lm_classes())
    return classes[config_class], tiny_config(config_class, FAMILIES[model_type])
