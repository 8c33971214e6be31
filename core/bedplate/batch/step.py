# SPDX-License-Identifier: Apache-2.0
"""The seam between planning a step and running it.

The engine hands a ``ScheduleBatch`` to a ``StepExecutor`` and gets a ``PendingStep`` at once;
the tokens arrive later.  ``runner.executor`` implements it with a model; tests and the
host-cost benchmark implement it with nothing behind.
"""

from __future__ import annotations

__all__ = ["PendingStep", "StepExecutor", "StepOutput", "TokenLogprobs"]

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bedplate.batch.schedule_batch import ScheduleBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities of one token, and of the most likely ones beside it.

    Attributes:
        token_id: The token.
        logprob: Natural logarithm of its probability before sampling filters, at
            temperature 1.
        top: (token id, logprob) of the most likely tokens, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one pass produced, on the host.

    Attributes:
        next_token_ids: ``[B]`` int64; −1 where nothing was sampled.
        logprobs: Row of the batch → the sampled token's, where asked for.
        prompt_logprobs: Row of the batch → one entry per new prompt token from
            ``prompt_logprob_start`` on (the prediction of the token after it).
        errors: Row of the batch → why this request alone must fail (for instance logits
            that are not numbers); the others are good.
        graph: Bucket that was replayed, or ``None``.
        graph_reason: Why no graph was used.
    """

    next_token_ids: npt.NDArray[np.int64]
    logprobs: dict[int, TokenLogprobs] | None = None
    prompt_logprobs: dict[int, list[TokenLogprobs]] | None = None
    errors: dict[int, str] | None = None
    graph: int | None = None
    graph_reason: str = ""


class PendingStep(Protocol):
    """A pass that was launched."""

    def ready(self) -> bool:
        """Whether ``wait`` would return at once."""

    def wait(self) -> StepOutput:
        """Block until the tokens are on the host. Call once.

        Raises:
            Exception: What the device or model raised; every request of the batch failed.
        """


class StepExecutor(Protocol):
    """Runs passes in order.

    ``launch`` may be called before the previous step was waited for; input tokens marked
    ``token_on_device`` are then taken on the device.
    """

    @property
    def asynchronous(self) -> bool:
        """Whether the host gains by planning the next step before this one is done."""

    def idle(self) -> bool:
        """Use a moment without work for what can wait; whether more is to do.

        Never called while a pass is in flight.
        """

    def set_request(self, row: int, params: Any, prompt_len: int) -> None:
        """Sampling settings of the request that now owns ``row`` of ``req_to_token``.

        Args:
            row: Request row, never 0.
            params: A resolved ``runner.sampling_params.SamplingParams``.
            prompt_len: Tokens that were given rather than sampled.
        """

    def launch(self, batch: ScheduleBatch) -> PendingStep:
        """Queue one pass; the arrays of ``batch`` may be overwritten after the return."""
