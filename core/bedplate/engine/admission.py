# SPDX-License-Identifier: Apache-2.0
"""What a caller gives, checked and completed before it becomes a request. Pure."""

from __future__ import annotations

__all__ = ["draw_seed", "prompt_tokens"]

from typing import TYPE_CHECKING

import numpy as np

from bedplate.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from bedplate.engine.track import TextCodec

_MASK = 2**64 - 1


def prompt_tokens(
    prompt: str | Sequence[int], codec: TextCodec | None, vocab_size: int | None
) -> npt.NDArray[np.int32]:
    """Token ids of a prompt.

    Returns:
        ``[n]`` int32, n ≥ 1.

    Raises:
        ConfigError: There are none, or some are not ids of this vocabulary.
    """
    if isinstance(prompt, str):
        if codec is None:
            raise ConfigError(
                "a text prompt needs a tokenizer, and this engine has none; give token ids"
            )
        prompt = codec.encode(prompt)
    tokens = np.asarray(prompt)
    if tokens.ndim != 1 or not len(tokens):
        raise ConfigError(
            f"a prompt must be a text or a list of token ids with at least one token, not "
            f"{_shown(prompt)}"
        )
    if tokens.dtype.kind not in "iu":
        raise ConfigError(f"a prompt holds {tokens.dtype} values; token ids are integers")
    limit = 2**31 if vocab_size is None else vocab_size
    wrong = tokens[(tokens < 0) | (tokens >= limit)]
    if len(wrong):
        raise ConfigError(
            f"{len(wrong)} token ids of the prompt are outside 0…{limit - 1}, for instance "
            f"{int(wrong[0])}; was it made with another tokenizer?"
        )
    return tokens.astype(np.int32)


def draw_seed(seed: int, number: int) -> int:
    """Seed of the ``number``-th request: scattered, and the same in every run."""
    state = (seed + number * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ state >> 27) * 0x94D049BB133111EB) & _MASK
    return (state ^ state >> 31) >> 1


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
