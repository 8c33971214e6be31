# SPDX-License-Identifier: Apache-2.0
"""What callers get back: finished requests, and pieces of running ones."""

from __future__ import annotations

__all__ = ["Delta", "RequestOutput", "RequestTimings", "StepResult"]

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bedplate.batch.step import TokenLogprobs
    from bedplate.scheduling.request import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimings:
    """Seconds since the request arrived; ``None`` for what never happened.

    Attributes:
        admitted_s: It got a row and began.
        first_token_s: Its first token reached the host.
        finished_s: It ended.
    """

    admitted_s: float | None
    first_token_s: float | None
    finished_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """One finished request.

    Attributes:
        request_id: The caller's name for it.
        prompt_token_ids: What was given.
        token_ids: New tokens, a stop token included.
        text: Their text, without a stop token or stop string; empty without a tokenizer.
        finish_reason: ``stop``, ``length``, ``abort`` or ``error``.
        stop_reason: The token or string that ended it, if one did.
        logprobs: One per new token, where asked for.
        prompt_logprobs: One per prompt token from the second on, where asked for.
        error: What went wrong, if ``finish_reason`` is ``error``.
        cached_tokens: Prompt tokens that were not computed again.
        timings: When things happened.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop_reason: int | str | None
    logprobs: tuple[TokenLogprobs, ...] | None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None
    error: str
    cached_tokens: int
    timings: RequestTimings

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and texts, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """News of one request.

    Attributes:
        request_id: Which.
        token_ids: New tokens since the last one.
        text: New text; may lag behind the tokens, never ends in half a character.
        output: The whole result, with the last one.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    output: RequestOutput | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one ``step`` brought, without a look at any single request.

    Attributes:
        numbers: ``[n]`` int64 arrival numbers of requests that got a token.
        token_ids: ``[n]`` int64 their tokens; valid until the next step.
        outputs: Requests that ended.
    """

    numbers: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int64]
    outputs: list[RequestOutput]
