# SPDX-License-Identifier: Apache-2.0
"""Text in and out: tokenizer, chat template, incremental detokenization, stop strings.

Everything here works on the host, per request, and is used only for requests that need
text.
"""

from __future__ import annotations

__all__ = ["IncrementalDetokenizer", "StopStringMatcher", "Tokenizer", "has_tokenizer"]

from typing import TYPE_CHECKING, Any

from tokenizers.decoders import DecodeStream

from bedplate.errors import ConfigError, ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_CONTEXT_TOKENS = 8
_REPLACEMENT = "\ufffd"


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder holds a tokenizer of any kind."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return any((folder / name).is_file() for name in names)


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Args:
        folder: Where ``tokenizer.json`` or the tokenizer's own files are.

    Raises:
        ModelNotFoundError: The folder holds no tokenizer that can be read.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._inner: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise ModelNotFoundError(
                f"No tokenizer could be read from {folder}: {error}. Put tokenizer.json beside "
                "the weights, name another folder with --tokenizer, or pass token ids"
            ) from error
        self._folder = folder

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return len(self._inner)

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end-of-text token."""
        eos: int | None = self._inner.eos_token_id
        return eos

    @property
    def has_chat_template(self) -> bool:
        """Whether ``apply_chat_template`` can work."""
        return bool(self._inner.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds itself."""
        ids: list[int] = self._inner.encode(text)
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, all at once."""
        text: str = self._inner.decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn.

        Args:
            messages: ``{"role": …, "content": …}`` each.
            tools: Descriptions of callable tools, if the template knows them.

        Raises:
            ConfigError: The tokenizer has no chat template.
        """
        if not self.has_chat_template:
            raise ConfigError(
                f"The tokenizer in {self._folder} has no chat template. Pass a plain prompt, "
                "or add chat_template to tokenizer_config.json"
            )
        text: str = self._inner.apply_chat_template(
            list(messages),
            tools=list(tools) if tools else None,
            add_generation_prompt=True,
            tokenize=False,
        )
        ids: list[int] = self._inner.encode(text, add_special_tokens=False)
        return ids

    def detokenizer(
        self, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> IncrementalDetokenizer:
        """A detokenizer for one request's new tokens."""
        return IncrementalDetokenizer(self, prompt, skip_special_tokens=skip_special_tokens)


class IncrementalDetokenizer:
    """New tokens in, finished characters out; never half a character.

    The last tokens of the prompt are the context, so that a leading space is kept.

    Args:
        tokenizer: The tokenizer.
        prompt: Token ids before the first new one.
        skip_special_tokens: Leave special tokens out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        context = [int(token) for token in prompt[-_CONTEXT_TOKENS:]]
        self._fast = getattr(tokenizer._inner, "backend_tokenizer", None)
        self._stream = DecodeStream(ids=context, skip_special_tokens=skip_special_tokens)
        self._ids = context
        self._shown = self._read(context) if self._fast is None else ""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that these tokens complete; may be empty."""
        if self._fast is not None:
            steps = (self._stream.step(self._fast, int(token)) for token in token_ids)
            return "".join(text for text in steps if text)
        self._ids = [*self._ids, *(int(token) for token in token_ids)]
        text = self._read(self._ids)
        if text.endswith(_REPLACEMENT):
            return ""
        fresh = text[len(self._shown) :]
        # Keep the window short: what was shown in full becomes the context.
        self._ids = self._ids[-_CONTEXT_TOKENS:]
        self._shown = self._read(self._ids)
        return fresh

    def _read(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


class StopStringMatcher:
    """Finds the first stop string in a stream of text pieces.

    Holds back as much text as could still become a stop string, and no more.

    Args:
        stops: Non-empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """One more piece.

        Returns:
            Text that may be shown, and the stop string that was found, or ``None``. What
            comes after a stop string is dropped.
        """
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            shown, self._held = self._held[:at], ""
            return shown, stop
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown, None

    def flush(self) -> str:
        """What was held back, once the request has ended without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
