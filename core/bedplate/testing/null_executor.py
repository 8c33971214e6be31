# SPDX-License-Identifier: Apache-2.0
"""Executors with no model behind: for tests of the engine and for its host cost.

``NullExecutor`` does nothing and answers the same token; what remains is the engine's own
work.  ``HistoryExecutor`` keeps token ids where a model keeps keys and values and answers with
a hash of the history that it reads back through its table, so that one wrong slot, position or
token changes everything that follows.
"""

from __future__ import annotations

__all__ = ["HistoryExecutor", "NullExecutor"]

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bedplate.batch.step import StepOutput, TokenLogprobs
from bedplate.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from bedplate.batch.schedule_batch import ScheduleBatch
    from bedplate.runner.sampling_params import SamplingParams

    Int64Array = npt.NDArray[np.int64]

_EMPTY = -1


@dataclass(frozen=True, slots=True)
class _Done:
    output: StepOutput

    def ready(self) -> bool:
        """Always."""
        return True

    def wait(self) -> StepOutput:
        """What was ready at once."""
        return self.output


class NullExecutor:
    """Answers ``token`` for every entry of every pass, at once.

    Args:
        max_batch: Most requests of a pass.
        token: The answer.
        asynchronous: What it says of itself.
    """

    def __init__(self, max_batch: int, *, token: int = 7, asynchronous: bool = False) -> None:
        tokens = np.full(max_batch, token, np.int64)
        self._answers = [
            _Done(StepOutput(next_token_ids=tokens[:size])) for size in range(max_batch + 1)
        ]
        self._asynchronous = asynchronous

    @property
    def asynchronous(self) -> bool:
        """As it was made."""
        return self._asynchronous

    def idle(self) -> bool:
        """Nothing can wait."""
        return False

    def set_request(self, row: int, params: object, prompt_len: int) -> None:
        """Nothing is kept."""

    def launch(self, batch: ScheduleBatch) -> _Done:
        """Nothing is run."""
        return self._answers[batch.batch_size]


class HistoryExecutor:
    """See the module.

    Args:
        num_slots: Slots of the pool, page 0 included.
        table_shape: Of ``req_to_token``.
        vocab_size: Answers are below it.
        eos_token_ids: Not answered before a request's ``min_tokens``.
        asynchronous: What it says of itself.

    Attributes:
        kept: ``[num_slots]`` token stored at each slot, −1 where nothing was ever written.
    """

    def __init__(
        self,
        num_slots: int,
        table_shape: tuple[int, int],
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        asynchronous: bool = False,
    ) -> None:
        self.kept = np.full(num_slots, _EMPTY, np.int64)
        self._table = np.zeros(table_shape, np.int32)
        self._last = np.full(table_shape[0], _EMPTY, np.int64)
        self._requests: dict[int, tuple[SamplingParams, int]] = {}
        self._vocab_size = vocab_size
        self._eos = tuple(eos_token_ids)
        self._asynchronous = asynchronous

    @property
    def asynchronous(self) -> bool:
        """As it was made."""
        return self._asynchronous

    def idle(self) -> bool:
        """Nothing can wait."""
        return False

    def set_request(self, row: int, params: SamplingParams, prompt_len: int) -> None:
        """Note who owns the row."""
        self._requests[row] = (params, prompt_len)

    def launch(self, batch: ScheduleBatch) -> _Done:
        """Run the pass in full; only its result is late.

        Raises:
            ContractError: A pass that no scheduler should plan.
        """
        lens = batch.extend_seq_lens
        lens = np.ones(batch.batch_size, np.int32) if lens is None else lens
        ids = self._inputs(batch, lens)
        self._store(batch, lens, ids)
        sample = np.ones(len(lens), np.bool_) if batch.sample is None else batch.sample
        tokens = np.full(len(lens), -1, np.int64)
        logprobs: dict[int, TokenLogprobs] = {}
        for i in np.flatnonzero(sample).tolist():
            row, length = int(batch.req_pool_indices[i]), int(batch.seq_lens[i])
            params, _ = self._requests[row]
            tokens[i] = self._last[row] = self._answer(row, length)
            if params.logprobs is not None:
                logprobs[i] = TokenLogprobs(token_id=int(tokens[i]), logprob=-float(length))
        return _Done(
            StepOutput(
                next_token_ids=tokens,
                logprobs=logprobs or None,
                prompt_logprobs=_prompt_logprobs(batch, ids),
                graph_reason="no model",
            )
        )

    def history(self, row: int, length: int) -> Int64Array:
        """``[length]`` tokens that a model would attend to."""
        found: Int64Array = self.kept[self._table[row, :length]]
        return found

    def _inputs(self, batch: ScheduleBatch, lens: npt.NDArray[np.int32]) -> Int64Array:
        ids = batch.input_ids.copy()
        if batch.token_on_device is not None:
            flags = batch.token_on_device
            ids[np.cumsum(lens)[flags] - 1] = self._last[batch.req_pool_indices[flags]]
        return ids

    def _store(
        self, batch: ScheduleBatch, lens: npt.NDArray[np.int32], ids: Int64Array
    ) -> None:
        update = batch.table_update
        if update is not None:
            self._table[update.rows, update.columns] = update.slots
        starts = batch.seq_lens - lens
        positions = np.concatenate(
            [np.arange(a, b) for a, b in zip(starts, batch.seq_lens, strict=True)]
        )
        if not np.array_equal(positions, batch.positions):
            raise ContractError("positions disagree with lengths")
        if len(np.unique(batch.out_cache_loc)) != batch.num_tokens:
            raise ContractError("two new tokens share a slot")
        if not batch.req_pool_indices.all() or not batch.out_cache_loc.all() or (ids < 0).any():
            raise ContractError("padding in a pass without padding")
        self._table[np.repeat(batch.req_pool_indices, lens), positions] = batch.out_cache_loc
        self.kept[batch.out_cache_loc] = ids

    def _answer(self, row: int, length: int) -> int:
        """A hash of seed and history, and not an end before ``min_tokens``."""
        params, prompt_len = self._requests[row]
        seed = (params.seed or 0) & 0xFFFFFFFF
        token = zlib.crc32(self.history(row, length).tobytes(), seed) % self._vocab_size
        if length - prompt_len + 1 > params.min_tokens:
            return token
        ends = {*self._eos, *params.stop_token_ids}
        while token in ends:
            token = (token + 1) % self._vocab_size
        return token


def _prompt_logprobs(
    batch: ScheduleBatch, ids: Int64Array
) -> dict[int, list[TokenLogprobs]] | None:
    """For each wanted new token: the prompt token after it, scored by its position."""
    starts, following = batch.prompt_logprob_start, batch.next_prompt_token
    if starts is None or following is None or batch.extend_seq_lens is None:
        return None
    ends = np.cumsum(batch.extend_seq_lens)
    found = {}
    for i in np.flatnonzero(starts >= 0).tolist():
        end, count = int(ends[i]), int(batch.extend_seq_lens[i])
        begin = end - count + int(starts[i])
        targets = [*ids[begin + 1 : end].tolist(), int(following[i])]
        places = range(int(batch.positions[begin]) + 1, int(batch.positions[end - 1]) + 2)
        found[i] = [
            TokenLogprobs(token_id=token, logprob=-float(place))
            for token, place in zip(targets, places, strict=True)
            if token >= 0
        ]
    return found
