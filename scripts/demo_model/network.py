# SPDX-License-Identifier: Apache-2.0
"""The demo network in plain torch, with the parameter names of transformers' Qwen3.

Apart from ``train`` so that it can be compared with transformers alone. Written out because
the training loop compiles it as one graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CONFIG", "Network"]

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "bfloat16",
    "use_cache": True,
}
"""The model's ``config.json``."""

HIDDEN, HEADS, KV_HEADS, HEAD = 256, 4, 2, 64


class _Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"])
        return (self.weight * (wide * scale)).to(x.dtype)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x`` [batch, heads, length, HEAD]; halves are the pairs."""
    left, right = x.float().chunk(2, dim=-1)
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return turned.to(x.dtype)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = _linear(HIDDEN, HEADS * HEAD)
        self.k_proj = _linear(HIDDEN, KV_HEADS * HEAD)
        self.v_proj = _linear(HIDDEN, KV_HEADS * HEAD)
        self.o_proj = _linear(HEADS * HEAD, HIDDEN)
        self.q_norm, self.k_norm = _Norm(HEAD), _Norm(HEAD)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, HEADS, HEAD)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, length, KV_HEADS, HEAD)).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, KV_HEADS, HEAD).transpose(1, 2)
        k, v = (
            t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (_rotate(k, cos, sin), v)
        )
        out = functional.scaled_dot_product_attention(
            _rotate(q, cos, sin), k, v, is_causal=True
        )
        mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, HEADS * HEAD))
        return mixed


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = CONFIG["intermediate_size"]
        self.gate_proj, self.up_proj = _linear(HIDDEN, inner), _linear(HIDDEN, inner)
        self.down_proj = _linear(inner, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return inner


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(), _Gated()
        self.input_layernorm, self.post_attention_layernorm = _Norm(HIDDEN), _Norm(HIDDEN)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], HIDDEN)
        self.layers = nn.ModuleList(_Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = _Norm(HIDDEN)


class Network(nn.Module):
    """The decoder with its tied head."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.model = _Decoder()
        positions = torch.arange(CONFIG["max_position_embeddings"])[:, None]
        angles = positions * CONFIG["rope_theta"] ** (-torch.arange(0, HEAD, 2) / HEAD)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                inner = "o_proj" in name or "down_proj" in name
                depth = math.sqrt(2 * CONFIG["num_hidden_layers"]) if inner else 1.0
                nn.init.normal_(weight, std=CONFIG["initializer_range"] / depth)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] of ``tokens`` [batch, length] (int64)."""
        length = tokens.shape[1]
        x = self.model.embed_tokens(tokens)
        if torch.is_autocast_enabled(x.device.type):  # as at inference, and half the traffic
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cos, sin = self.cos[:length], self.sin[:length]
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return functional.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def loss(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean cross-entropy of every next token; ``weights`` [batch, length]."""
        logits = self(tokens).flatten(0, 1).float()
        target = tokens.roll(-1, dims=1).flatten()
        weight = weights.roll(-1, dims=1).float()
        weight[:, -1] = 0
        each = functional.cross_entropy(logits, target, reduction="none")
        return (each * weight.flatten()).sum() / weight.sum()
