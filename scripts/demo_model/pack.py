# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens for training: chat is never cut, documentation fills the gaps.

Apart from ``train`` because worker processes import it without torch.
"""

from __future__ import annotations

import os
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scripts.demo_model.corpus import END_OF_TEXT, document
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.queues import Queue
    from multiprocessing.sharedctypes import Synchronized
    from pathlib import Path

__all__ = [
    "Tokens",
    "Weights",
    "chat_stream",
    "encode_docs",
    "feed",
    "pack_rows",
    "token_weights",
]

Tokens = npt.NDArray[np.uint16]
Weights = npt.NDArray[np.uint8]

# Tenths. What the user says is mostly random words, which nothing can predict.
_PROMPT, _DOCS, _ANSWER = 1, 5, 10
_DOCS_ROWS = 0.06
"""Share of rows that hold documentation only; the gaps add twice as much again."""


def encode_docs(tokenizer: Tokenizer, pages: list[str]) -> Tokens:
    """All pages as one stream, each ended by ``END_OF_TEXT``."""
    encoded = tokenizer.encode_batch([page + END_OF_TEXT for page in pages])
    return np.concatenate([np.asarray(page.ids, dtype=np.uint16) for page in encoded])


def token_weights(tokens: Tokens, tokenizer: Tokenizer) -> Weights:
    """Loss weight of each token of a stream of documents: answers count most.

    An answer runs from after ``<|im_start|>assistant\\n`` to its ``<|im_end|>``; a document
    without chat marks counts as an answer as a whole.
    """
    start, end, stop, role = (
        tokenizer.token_to_id(text)
        for text in ("<|im_start|>", "<|im_end|>", END_OF_TEXT, "assistant")
    )
    opens = np.flatnonzero((tokens[:-1] == start) & (tokens[1:] == role)) + 3
    ends = np.flatnonzero(tokens == end)
    closes = ends[np.searchsorted(ends, opens)] + 1
    inside = np.zeros(len(tokens) + 1, dtype=np.int8)
    inside[opens] = 1
    inside[closes] -= 1
    answer = np.cumsum(inside[:-1]) > 0
    stops = np.flatnonzero(tokens == stop)
    first = np.concatenate([[0], stops[:-1] + 1])
    chat = np.repeat(tokens[first] == start, np.diff(np.concatenate([[0], stops + 1])))
    answer |= ~chat | (tokens == stop)
    return np.where(answer, _ANSWER, _PROMPT).astype(np.uint8)


def chat_stream(
    rng: Random, tokenizer: Tokenizer, *, long: bool
) -> Iterator[tuple[Tokens, Weights]]:
    """Tokens and weights of one generated document after the other, without end."""
    while True:
        encoded = tokenizer.encode_batch([document(rng, long=long) for _ in range(1000)])
        stream = np.fromiter((token for item in encoded for token in item.ids), dtype=np.uint16)
        weights = token_weights(stream, tokenizer)
        at = 0
        for item in encoded:
            end = at + len(item.ids)
            yield stream[at:end], weights[at:end]
            at = end


def pack_rows(
    chat: Iterator[tuple[Tokens, Weights]], docs: Tokens, rng: Random, *, rows: int, width: int
) -> tuple[Tokens, Weights]:
    """``rows`` × ``width`` tokens and weights; gaps after whole ``chat`` come from ``docs``."""
    tokens = np.empty((rows, width), dtype=np.uint16)
    weights = np.full((rows, width), _DOCS, dtype=np.uint8)
    item = next(chat)
    for row in range(rows):
        at, only_docs = 0, rng.random() < _DOCS_ROWS
        while not only_docs and (end := at + len(item[0])) <= width:
            tokens[row, at:end], weights[row, at:end] = item
            at, item = end, next(chat)
        if len(item[0]) > width:
            item = next(chat)
        begin = rng.randrange(len(docs) - width)
        tokens[row, at:] = docs[begin : begin + width - at]
    return tokens, weights


def feed(
    queue: Queue[tuple[Tokens, Weights]],
    folder: Path,
    seed: tuple[int, int],
    width: Synchronized[int],
    batch_tokens: int,
) -> None:
    """Worker process: packs batches for ever, in rows of the current ``width``.

    ``folder`` holds ``tokenizer.json`` and ``docs.npy``.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    docs: Tokens = np.load(folder / "docs.npy")
    rng = Random(f"{seed}")
    chats = {long: chat_stream(rng, tokenizer, long=long) for long in (False, True)}
    while True:
        row = width.value
        rows = batch_tokens // row
        queue.put(pack_rows(chats[row > 1024], docs, rng, rows=rows, width=row))
