# SPDX-License-Identifier: Apache-2.0
"""Trains the byte-level BPE of the demo model and writes its files.

A few seconds on one core::

    python -m scripts.demo_model.tokenizer .carry/docs.txt.xz core/bedplate/demo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from scripts.demo_model.corpus import END_OF_TEXT, document
from scripts.demo_model.docs_text import read_docs
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CHAT_TEMPLATE", "SPECIAL", "VOCABULARY", "train_tokenizer", "write_tokenizer"]

VOCABULARY = 4096
SPECIAL = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")

# One digit is one piece; letters take one leading blank; line ends stay apart from words.
_PIECES = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}
    {{- '<|im_start|>system\\n' + (system + '\\n\\n' if system else '') + 'Tools:' }}
    {%- for tool in tools %}
        {{- '\\n' + ((tool.function if tool.function is defined else tool) | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif system %}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\\n' if message.content or not loop.first else '' }}
            {{- '<tool_call>\\n{"name": ' + (call.name | tojson) + ', "arguments": ' }}
            {{- call.arguments if call.arguments is string else (call.arguments | tojson) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def _sample_text(pages: list[str], seed: int) -> Iterator[str]:
    """Docs once, and about as many characters of chat."""
    yield from pages
    rng = Random(seed)
    for _ in range(20_000):
        yield document(rng)


def train_tokenizer(pages: list[str], seed: int = 0) -> Tokenizer:
    """A byte-level BPE of ``VOCABULARY`` entries; ``SPECIAL`` takes the first ids."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(_PIECES), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample_text(pages, seed), trainer)
    return _show_tool_marks(tokenizer)


def _show_tool_marks(tokenizer: Tokenizer) -> Tokenizer:
    """Decoding drops special tokens; the tool-call marks belong to the answer and must stay."""
    data = json.loads(tokenizer.to_str())
    for entry in data["added_tokens"]:
        entry["special"] = "tool_call" not in entry["content"]
    return Tokenizer.from_str(json.dumps(data, ensure_ascii=False))


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """``tokenizer.json`` and ``tokenizer_config.json`` for ``AutoTokenizer``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": END_OF_TEXT,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_tokenizer(train_tokenizer(read_docs(Path(sys.argv[1]))), Path(sys.argv[2]))
