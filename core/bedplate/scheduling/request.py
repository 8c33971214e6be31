# SPDX-License-Identifier: Apache-2.0
"""One request as the host knows it: what was asked, and where it stands.

The hot path does not read it: while a request runs, its numbers are columns of
``table.RequestTable``.  The scheduler writes the fields below; the engine reads them.
"""

from __future__ import annotations

__all__ = ["FinishReason", "Request", "RequestState"]

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

import numpy as np

from bedplate.scheduling.policy import rank

if TYPE_CHECKING:
    import numpy.typing as npt

    from bedplate.batch.step import TokenLogprobs
    from bedplate.runner.sampling_params import SamplingParams
    from bedplate.scheduling.prefix_cache import PrefixNode

    Int32Array = npt.NDArray[np.int32]


def _no_slots() -> Int32Array:
    return np.zeros(0, np.int32)


FinishReason = Literal["stop", "length", "abort", "error"]


class RequestState(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    """In the queue; owns no row and no slots."""
    EXTENDING = "extending"
    """Owns a row; part of its prompt is not yet planned."""
    JOINING = "joining"
    """Its whole prompt is planned; it decodes from the next pass on."""
    DECODING = "decoding"
    """A member of the decode batch."""
    ENDING = "ending"
    """Its last token is planned; nothing more to plan."""
    FINISHED = "finished"
    """Owns nothing any more."""


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One request.

    Attributes:
        request_id: The caller's name for it.
        number: Order of arrival.
        tokens: ``[n]`` int32 host; prompt and what was generated, as of the last time that
            the request owned no row. While it owns one, the table knows better.
        prompt_len: Tokens that were given.
        params: Resolved settings; the seed is set.
        priority: Higher goes first.
        max_len: Prompt and new tokens at the end, at most.
        min_len: Stop tokens do not end the request before this length.
        stop_ids: Tokens that end it, the model's own included unless they are ignored.
        row: Row of ``req_to_token``; 0 while it owns none.
        node: Deepest node of the prefix cache that it holds locked.
        borrowed: ``[n]`` int32 slots of the cached prefix it was admitted with.
        shared_len: Leading tokens whose slots belong to the prefix cache.
        ready: Its prompt was computed and a token came out, since it last got a row.
        cached_tokens: Prompt tokens found in the prefix cache at first admission.
        preemptions: How often it had to give way.
        output: ``[n]`` int32, the new tokens; set when it has finished.
        logprobs: One per new token, where asked for.
        prompt_logprobs: From the second prompt token on, where asked for.
        scored: Prompt tokens whose logprobs have been planned.
        admitted_s: Monotonic second of the first admission; 0 before.
        first_token_s: The same of the first token.
        finished_s: The same of the end.
    """

    request_id: str
    number: int
    tokens: Int32Array
    prompt_len: int
    params: SamplingParams
    priority: int
    max_len: int
    min_len: int
    stop_ids: tuple[int, ...]
    arrived_s: float
    state: RequestState = RequestState.WAITING
    row: int = 0
    node: PrefixNode | None = None
    borrowed: Int32Array = field(default_factory=_no_slots)
    shared_len: int = 0
    ready: bool = False
    cached_tokens: int | None = None
    preemptions: int = 0
    output: Int32Array | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    scored: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str = ""
    admitted_s: float = 0.0
    first_token_s: float = 0.0
    finished_s: float = 0.0

    @property
    def rank(self) -> tuple[int, int]:
        """Sort key: smaller goes first."""
        return rank(self.priority, self.number)

    @property
    def finished(self) -> bool:
        """Nothing more will come."""
        return self.state is RequestState.FINISHED
