# SPDX-License-Identifier: Apache-2.0
"""Answer several prompts in one batch with the bundled demo model."""

from bedplate import Engine, SamplingParams

PROMPTS = ["What is 12 + 30?", "What is 5 + 9?"]

with Engine() as engine:
    chats = [
        engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        for prompt in PROMPTS
    ]
    for prompt, output in zip(
        PROMPTS, engine.generate(chats, SamplingParams(max_tokens=32)), strict=True
    ):
        print(f"{prompt}  →  {output.text.strip()}  ({output.finish_reason})")
