# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of the whole engine, beside transformers in the same process.

    python -m benchmarks.cases.generation [--dtype bfloat16] [--rounds 3] [--json FILE]

A Qwen3 shape of about 150 M parameters with random weights, greedy, 32 requests of mixed prompt
lengths and 64 new tokens each; then one request alone.  All contestants have the same weights,
dtype, threads and prompts, and take turns, so that a change of the machine's mood hits all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config
from transformers import __version__ as transformers_version

from bedplate import Engine, SamplingParams

NEW_TOKENS = 64
SHAPE = {
    "hidden_size": 768,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(16, 257, size=count)
    return [rng.integers(4, 32000, size=n).tolist() for n in lengths]


def make_checkpoint(folder: Path, dtype: torch.dtype) -> int:
    torch.manual_seed(0)
    config = Qwen3Config(
        **SHAPE,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        dtype=str(dtype)[6:],
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config = GenerationConfig(
        eos_token_id=None, pad_token_id=3, bos_token_id=1
    )
    model.save_pretrained(folder)
    vocab = {f"t{i}": i for i in range(config.vocab_size)}
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return sum(p.numel() for p in model.parameters())


def ours(engine: Engine, requests: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    return [list(out.token_ids) for out in engine.generate(requests, params)]


def padded_generate(model: torch.nn.Module, requests: list[list[int]]) -> list[list[int]]:
    longest = max(map(len, requests))
    ids = torch.tensor([[3] * (longest - len(r)) + r for r in requests])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in requests])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=3,
        )
    return out[:, longest:].tolist()


def continuous_batching(model: torch.nn.Module, requests: list[list[int]]) -> list[list[int]]:
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=3
    )
    with torch.no_grad():
        results = model.generate_batch(requests, generation_config=config, progress_bar=False)
    ordered = sorted(results.values(), key=lambda r: int(str(r.request_id).rsplit("_", 1)[-1]))
    return [list(r.generated_tokens) for r in ordered]


def measure(run, requests: list[list[int]]) -> tuple[float, int]:
    begin = time.perf_counter()
    tokens = run(requests)
    return time.perf_counter() - begin, sum(map(len, tokens))


def rate(samples: list[tuple[float, int]]) -> dict[str, float]:
    rates = sorted(tokens / seconds for seconds, tokens in samples)
    return {"median": statistics.median(rates), "min": rates[0], "max": rates[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--only", help="comma-separated names of contestants")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        size = make_checkpoint(Path(folder), dtype)
        load = {"dtype": dtype, "local_files_only": True}
        sdpa = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", **load
        ).eval()
        paged = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", **load
        ).eval()
        engine = Engine(
            folder, backend="cpu", dtype=options.dtype, max_context_len=512, prefix_cache=False
        )
        contestants = {
            "bedplate": lambda r: ours(engine, r),
            "transformers generate (padded)": lambda r: padded_generate(sdpa, r),
            "transformers continuous batching": lambda r: continuous_batching(paged, r),
        }
        if options.only:
            wanted = options.only.split(",")
            contestants = {n: c for n, c in contestants.items() if any(w in n for w in wanted)}
        print(
            f"{size / 1e6:.0f} M parameters, {options.dtype}, {torch.get_num_threads()} "
            f"threads, torch {torch.__version__}, transformers {transformers_version}, "
            f"{platform.machine()}"
        )
        report: dict[str, object] = {}
        for title, requests in (
            (f"{options.requests} requests", prompts(options.requests)),
            ("1 request", prompts(1)),
        ):
            samples: dict[str, list[tuple[float, int]]] = {name: [] for name in contestants}
            for _round in range(options.rounds + 1):
                for name, run in contestants.items():
                    samples[name].append(measure(run, requests))
            rates = {name: rate(taken[1:]) for name, taken in samples.items()}
            first = rates["bedplate"]["median"] if "bedplate" in rates else float("nan")
            print(f"\n{title}, {NEW_TOKENS} new tokens each, tokens/s (first round dropped)")
            for name, row in rates.items():
                print(
                    f"  {name:34s} median {row['median']:8.1f}   min {row['min']:8.1f}   "
                    f"max {row['max']:8.1f}   bedplate is {first / row['median']:.2f} ×"
                )
            report[title] = rates
        engine.close()
        if options.json:
            options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
