# SPDX-License-Identifier: Apache-2.0
"""Do by hand what an engine does: slots, a batch, a pass, a token; and print the batch.

One request, the prompt in one EXTEND pass and then one DECODE pass per token.
``docs/explanation/one-decode-step.md`` tells the same story in words.
"""

import numpy as np
import torch

from bedplate import Engine, ExtendPart, ForwardBatch, ForwardMode, SamplingParams

PROMPT = "Once upon a time"
NEW_TOKENS = 6


def look(batch: ForwardBatch) -> None:
    """Print what the model and attention are given."""
    print(batch.mode.name)
    for name in ("input_ids", "positions", "seq_lens", "req_pool_indices", "out_cache_loc"):
        print(f"  {name:17s}{getattr(batch, name).tolist()}")


with Engine() as engine:
    runner = engine.runner
    device = runner.bound.runtime.device
    table, allocator = runner.req_to_token_pool, runner.allocator
    prompt = engine.tokenizer.encode(PROMPT)

    def int32(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def step(tokens: list[int], cached: int) -> int:
        """Run ``tokens`` on top of ``cached`` ones; the next token."""
        length = cached + len(tokens)
        lengths = np.array([cached], np.int32), np.array([length], np.int32)
        last = np.array([table.req_to_token[row, cached - 1] if cached else -1], np.int32)
        slots = torch.from_numpy(allocator.alloc_extend(*lengths, last)).to(device)
        table.req_to_token[row, cached:length] = slots
        extend = ExtendPart(
            seq_lens=int32(len(tokens)), prefix_lens=int32(cached), start_loc=int32(0),
            seq_lens_cpu=int32(len(tokens)).cpu(), prefix_lens_cpu=int32(cached).cpu(),
        )  # fmt: skip
        batch = ForwardBatch(
            mode=ForwardMode.DECODE if cached else ForwardMode.EXTEND,
            batch_size=1,
            input_ids=torch.tensor(tokens, device=device),
            positions=torch.arange(cached, length, device=device),
            req_pool_indices=int32(row),
            seq_lens=int32(length),
            seq_lens_cpu=int32(length).cpu(),
            out_cache_loc=slots,
            logits_rows=torch.tensor([len(tokens) - 1], device=device),
            extend=None if cached else extend,
        )
        batch.check()
        look(batch)
        with runner.bound.runtime.inference_guard():
            output, _replayed = runner.forward(batch)
            return int(runner.sample(output, batch))

    (row,) = table.alloc(1)
    tokens = [step(prompt, cached=0)]
    while len(tokens) < NEW_TOKENS:
        tokens.append(step(tokens[-1:], cached=len(prompt) + len(tokens) - 1))

    print(PROMPT + engine.tokenizer.decode(tokens))
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    (expected,) = engine.generate(prompt, params)
    print("the same tokens as Engine.generate:", list(expected.token_ids) == tokens)
