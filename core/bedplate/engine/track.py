# SPDX-License-Identifier: Apache-2.0
"""Track: the text and the listener of one request.

Only requests that stream or have stop strings are looked at in every step; the text of the
others is made once, at the end, by the same detokenizer.
"""

from __future__ import annotations

__all__ = ["Detokenizer", "TextCodec", "Track"]

from typing import TYPE_CHECKING, Protocol

from bedplate.engine.outputs import Delta, RequestOutput, RequestTimings
from bedplate.engine.text import StopStringMatcher

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bedplate.scheduling.request import Request


class Detokenizer(Protocol):
    """Makes the text of one request; ``engine.text.IncrementalDetokenizer``."""

    def push(self, token_ids: Sequence[int], /) -> str:
        """Text that these tokens complete."""


class TextCodec(Protocol):
    """What the engine needs of ``engine.text.Tokenizer``."""

    def encode(self, text: str, /) -> list[int]:
        """Token ids of a text."""

    def detokenizer(
        self, prompt: Sequence[int], /, *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        """A detokenizer for what follows ``prompt``."""


class Track:
    """See the module.

    Args:
        request: The request, before it begins.
        codec: Makes text; ``None`` leaves it empty.
        sink: Is told the news; the last piece has the output.
        stream: Whether the sink wants pieces before the end.

    Attributes:
        watched: Whether ``push`` must be called in every step that brings tokens.
        seen: New tokens that were pushed.
    """

    def __init__(
        self,
        request: Request,
        codec: TextCodec | None,
        sink: Callable[[Delta], None] | None,
        *,
        stream: bool,
    ) -> None:
        self.request = request
        self._sink = sink
        self._stream = stream and sink is not None
        self._codec = codec
        self._prompt = request.tokens.tolist()
        self._detokenizer: Detokenizer | None = None
        self._stops = StopStringMatcher(request.params.stop) if request.params.stop else None
        self._text: list[str] = []
        self.watched = self._stream or self._stops is not None
        self.seen = 0
        self._told = (0, 0)

    def push(self, token_ids: list[int]) -> str | None:
        """Take in new tokens of a running request and tell the sink.

        Returns:
            The stop string that the text has run into, if any; nothing was told then, since
            the end is near.
        """
        text, stop = self._read(token_ids)
        self._text.append(text)
        if stop is None and self._stream:
            self._tell(token_ids, text)
            self._told = (self.seen, len(self._text))
        return stop

    def close(self) -> RequestOutput:
        """The request has ended: read the rest and make the result.

        A stop string in the rest becomes the reason of the end.
        """
        request = self.request
        assert request.output is not None  # set when it finished
        new = request.output.tolist()
        rest = new[self.seen :]
        by_token = request.finish_reason == "stop" and isinstance(request.stop_reason, int)
        text, stop = "", None
        if request.finish_reason != "error" and not isinstance(request.stop_reason, str):
            text, stop = self._read(rest[:-1] if by_token else rest)
            if stop is not None:
                request.finish_reason, request.stop_reason = "stop", stop
            elif self._stops is not None:
                text += self._stops.flush()
        self._text.append(text)
        return self._output(new)

    def give_up(self) -> RequestOutput:
        """The text could not be made: end without another attempt."""
        self._codec = None
        self._stops = None
        return self.close()

    def report(self, output: RequestOutput) -> None:
        """Tell the sink the result, with what it has not heard yet."""
        tokens, parts = self._told
        self._tell(list(output.token_ids[tokens:]), "".join(self._text[parts:]), output)

    def _read(self, token_ids: list[int]) -> tuple[str, str | None]:
        self.seen += len(token_ids)
        if self._codec is None or not token_ids:
            return "", None
        if self._detokenizer is None:
            self._detokenizer = self._codec.detokenizer(
                self._prompt, skip_special_tokens=self.request.params.skip_special_tokens
            )
        if self._stops is None:
            return self._detokenizer.push(token_ids), None
        return self._match(self._detokenizer, token_ids)

    def _match(self, detokenizer: Detokenizer, token_ids: list[int]) -> tuple[str, str | None]:
        """Token by token, since a stop string counts only from ``min_tokens`` on."""
        assert self._stops is not None  # asked by the caller
        shown, first = [], self.seen - len(token_ids)
        for place, token in enumerate(token_ids, first + 1):
            text = detokenizer.push([token])
            if place < self.request.params.min_tokens:
                shown.append(text)
                continue
            text, stop = self._stops.push(text)
            shown.append(text)
            if stop is not None:
                return "".join(shown), stop
        return "".join(shown), None

    def _tell(
        self, token_ids: list[int], text: str, output: RequestOutput | None = None
    ) -> None:
        if self._sink is not None:
            delta = Delta(
                request_id=self.request.request_id,
                token_ids=tuple(token_ids),
                text=text,
                output=output,
            )
            self._sink(delta)

    def _output(self, token_ids: list[int]) -> RequestOutput:
        request, params = self.request, self.request.params
        assert request.finish_reason is not None  # set when it finished
        return RequestOutput(
            request_id=request.request_id,
            prompt_token_ids=tuple(self._prompt),
            token_ids=tuple(token_ids),
            text="".join(self._text),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            logprobs=None if params.logprobs is None else tuple(request.logprobs),
            prompt_logprobs=(
                None if params.prompt_logprobs is None else tuple(request.prompt_logprobs)
            ),
            error=request.error,
            cached_tokens=request.cached_tokens or 0,
            timings=_timings(request),
        )


def _timings(request: Request) -> RequestTimings:
    def since(moment: float) -> float | None:
        return moment - request.arrived_s if moment else None

    return RequestTimings(
        admitted_s=since(request.admitted_s),
        first_token_s=since(request.first_token_s),
        finished_s=request.finished_s - request.arrived_s,
    )
