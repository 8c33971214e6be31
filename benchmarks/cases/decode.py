# SPDX-License-Identifier: Apache-2.0
"""Milliseconds of a decode step and of a prompt, on any backend, with made-up weights.

    python -m benchmarks.cases.decode qwen3-0.6b --backend NAME --batches 1,8,32,128,256

A step is the difference of two runs with 16 and 144 new tokens divided by 128, the better of
two; context 1,024, greedy, no prefix hits.  A prompt's time is that of a whole ``generate``
call.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from bedplate import Engine, SamplingParams

# hidden, layers, query heads, key/value heads, head size, MLP, tied
SHAPES = {
    "tiny": (64, 2, 4, 2, 16, 128, True),
    "qwen3-0.6b": (1024, 28, 16, 8, 128, 3072, True),
    "qwen3-8b": (4096, 36, 32, 8, 128, 12288, False),
}
VOCABULARY = 151936


def write_config(shape: str, folder: Path) -> None:
    hidden, layers, heads, kv_heads, head_dim, mlp, tied = SHAPES[shape]
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16",
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "intermediate_size": mlp,
        "vocab_size": VOCABULARY if shape != "tiny" else 512, "tie_word_embeddings": tied,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "max_position_embeddings": 40960, "attention_bias": False, "use_cache": True,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def seconds(
    engine: Engine, rng: np.random.Generator, batch: int, context: int, new: int
) -> float:
    vocabulary = engine.runner.spec.vocab_size
    prompts = [rng.integers(4, vocabulary, size=context).tolist() for _ in range(batch)]
    begin = time.perf_counter()
    engine.generate(prompts, SamplingParams(max_tokens=new, ignore_eos=True))
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batches", default="1,8,32,128,256")
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    batches = [int(size) for size in options.batches.split(",")]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        write_config(options.shape, Path(name))
        engine = Engine(
            name, backend=options.backend, load_format="dummy", prefix_cache=False,
            max_context_len=options.context + 160, max_running_requests=max(batches),
            chunked_prefill_tokens=8192, capture_sizes=tuple(batches),
        )  # fmt: skip
        with engine:
            for batch in batches:
                seconds(engine, rng, batch, options.context, 4)
                steps = [
                    seconds(engine, rng, batch, options.context, 144)
                    - seconds(engine, rng, batch, options.context, 16)
                    for _ in range(2)
                ]
                ms = min(steps) / 128 * 1e3
                rate = batch / ms * 1e3
                print(f"decode, batch {batch}: {ms:.2f} ms a step, {rate:.0f} tokens/s")
            for batch in (1, 16):
                best = min(seconds(engine, rng, batch, options.context, 1) for _ in range(4))
                print(f"prompts, {batch} × {options.context}: {best * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
