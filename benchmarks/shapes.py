# SPDX-License-Identifier: Apache-2.0
"""Real shapes of well-known models, as configurations for made-up weights.

Also what physics asks of them: bytes that a decode step must read, operations of a prompt.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from bedplate import demo

if TYPE_CHECKING:
    from pathlib import Path

    from bedplate import Engine

_COMMON = {
    "dtype": "bfloat16", "hidden_act": "silu", "use_cache": True, "attention_bias": False,
    "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-6,
}  # fmt: skip


def _qwen3(hidden: int, layers: int, heads: int, mlp: int, *, tied: bool) -> dict[str, Any]:
    return _COMMON | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": mlp, "vocab_size": 151936,
        "tie_word_embeddings": tied, "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip


def _llama(hidden: int, layers: int, size: int, mlp: int, *, tied: bool) -> dict[str, Any]:
    return _COMMON | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": size, "intermediate_size": mlp, "vocab_size": 128256,
        "tie_word_embeddings": tied, "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288, tied=False),
    "llama-3.2-1b": _llama(2048, 16, 64, 8192, tied=True),
    "llama-3.1-8b": _llama(4096, 32, 128, 14336, tied=False),
    # Sinks, alternating windows, experts; a third of the 20 B model's layers.
    "gpt-oss-like": _COMMON | {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880,
        "num_hidden_layers": 8, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 32,
        "num_experts_per_tok": 4, "vocab_size": 201088, "sliding_window": 128,
        "max_position_embeddings": 131072, "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    # Latent attention, shared and routed experts; the Lite model's layers, a third of them.
    "deepseek-like": _COMMON | {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "hidden_size": 2048, "num_hidden_layers": 9, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": None,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "vocab_size": 102400, "max_position_embeddings": 16384,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "demo": json.loads((demo.path() / "config.json").read_text()),
    "tiny": _qwen3(64, 2, 4, 128, tied=True)
    | {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512},
}  # fmt: skip


def write_config(shape: str, folder: Path) -> None:
    """The folder becomes a checkpoint without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape], indent=1))


def step_bytes(engine: Engine, batch: int, context: int) -> int:
    """Least bytes of a decode step: every weight once but the input embedding, and the cache.

    Of experts, as many are counted as the batch must touch at least: those of one token.
    """
    module: Any = engine.runner.loaded.module
    embedding = module.get_input_embeddings().weight
    head = module.get_output_embeddings().weight
    config = module.config.get_text_config()
    routed = getattr(config, "num_experts_per_tok", None)
    read = 0
    for name, weight in module.named_parameters():
        if weight is embedding and weight is not head:
            continue
        share = 1.0
        if routed is not None and weight.dim() == 3 and "experts" in name:
            share = min(1.0, routed / len(weight))
        read += int(weight.nbytes * share)
    return read + batch * context * cell_bytes(engine)


def cell_bytes(engine: Engine) -> int:
    """Bytes of one token's keys and values in all layers, windows not counted out."""
    pool = engine.runner.kv_pool
    seen: dict[int, int] = {}
    for call in engine.runner.spec.calls:
        for stored in (pool.key(call.call_id), pool.value(call.call_id)):
            storage = stored.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes() // stored.shape[0]
    return sum(seen.values())


def prompt_flops(engine: Engine, lengths: list[int]) -> int:
    """Operations of prompts: two a weight and token outside the embeddings, and attention."""
    module: Any = engine.runner.loaded.module
    ends = {id(module.get_input_embeddings().weight), id(module.get_output_embeddings().weight)}
    config = module.config.get_text_config()
    routed = getattr(config, "num_experts_per_tok", None)
    body = 0
    for name, weight in module.named_parameters():
        if id(weight) in ends or weight.dim() < 2:
            continue
        share = 1.0
        if routed is not None and weight.dim() == 3 and "experts" in name:
            share = min(1.0, routed / len(weight))
        body += int(weight.numel() * share)
    attention = sum(
        call.num_heads * (call.head_dim + call.value_dim) * length * length
        for call in engine.runner.spec.calls
        for length in lengths
    )
    return 2 * body * sum(lengths) + attention


def parameter_bytes(engine: Engine) -> int:
    """Bytes of all weights, tied ones once."""
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for p in engine.runner.loaded.module.parameters()
    }
    return sum(storages.values())


def is_device(engine: Engine) -> bool:
    """Whether the engine runs on an accelerator."""
    return torch.device(engine.runner.bound.runtime.device).type != "cpu"
