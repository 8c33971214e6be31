# SPDX-License-Identifier: Apache-2.0
"""What each fusion pattern is worth on this host: on against off, inside one run.

``python -m benchmarks.cases.fusion_patterns [threads] [dtype …]``; about two minutes on a quiet
machine. Shape: Qwen3 of 150 M parameters. Times are the least of many, taken in turns; with
one thread they are processor time, which neighbours disturb less.
"""

from __future__ import annotations

import sys
import time

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from bedplate.models.fusion import fuse
from bedplate.reference.ops import OPERATIONS
from bedplate.registry.decisions import DecisionLog
from bedplate.registry.ops import Operations
from bedplate_cpu import ops as cpu_ops

CONFIG = Qwen3Config(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
    head_dim=64, intermediate_size=2048, vocab_size=32_000,
)  # fmt: skip
ROUNDS = 25


def seconds(model, ids):
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    model(input_ids=ids, use_cache=False)
    return clock() - start


def measure(dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=dtype).eval().requires_grad_(False)
    ops = Operations(OPERATIONS, DecisionLog(), "cpu")
    cpu_ops.register(ops)
    plan = fuse(model, ops)
    print(f"{dtype}: {plan.counts()}")
    variants = {"off": (), "siblings": ("siblings",), "norm": ("norm",)}
    variants["both"] = ("siblings", "norm")
    for tokens in (1, 32):
        ids = torch.randint(0, CONFIG.vocab_size, (1, tokens))
        best = dict.fromkeys(variants, float("inf"))
        for _ in range(ROUNDS):
            for name, patterns in variants.items():
                plan.revert()
                for site in plan.sites:
                    if site.pattern in patterns:
                        site.apply()
                seconds(model, ids)
                best[name] = min(best[name], seconds(model, ids))
        row = "  ".join(
            f"{n} {t * 1e3:.2f} ms (x{best['off'] / t:.3f})" for n, t in best.items()
        )
        print(f"  [1, {tokens}]  {row}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    with torch.no_grad():
        for name in sys.argv[2:] or ("float32", "bfloat16"):
            measure(getattr(torch, name))
