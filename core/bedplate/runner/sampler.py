# SPDX-License-Identifier: Apache-2.0
"""Sampler: the sampling settings of all live requests, and one step's choice of tokens.

Settings are kept in host arrays indexed by request row and change only when a request gets
its row; a batch of greedy requests costs one maximum and nothing else.

Shapes: S rows that sample, V vocabulary.
"""

from __future__ import annotations

__all__ = ["Sampler"]

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bedplate.reference.sampling import (
    FilterParams,
    sample_filtered,
    sample_greedy,
    sample_plain,
    uniform,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from bedplate.batch.schedule_batch import ScheduleBatch
    from bedplate.runner.sampling_params import SamplingParams

    Int32Array = npt.NDArray[np.int32]
    Int64Array = npt.NDArray[np.int64]

_UNLIMITED = np.iinfo(np.int64).max


class Sampler:
    """Chooses tokens.

    Args:
        num_rows: Rows of ``req_to_token``.
        eos_token_ids: Tokens that no request may sample before its ``min_tokens``.
        device: Where the logits are.

    Attributes:
        logprobs: ``[num_rows]`` how many alternatives each request reports; −1 = none.
        prompt_logprobs: The same for prompts.
    """

    def __init__(
        self, num_rows: int, eos_token_ids: tuple[int, ...], device: torch.device
    ) -> None:
        self._eos = eos_token_ids
        self._device = device
        self._temperature = np.zeros(num_rows, np.float32)
        self._top_k = np.full(num_rows, _UNLIMITED, np.int64)
        self._top_p = np.ones(num_rows, np.float32)
        self._min_p = np.zeros(num_rows, np.float32)
        self._filtered = np.zeros(num_rows, bool)
        self._seed = np.zeros(num_rows, np.uint64)
        self._free_from = np.zeros(num_rows, np.int64)
        self._banned: dict[int, tuple[int, ...]] = {}
        self.logprobs = np.full(num_rows, -1, np.int64)
        self.prompt_logprobs = np.full(num_rows, -1, np.int64)

    def set_request(self, row: int, params: SamplingParams, prompt_len: int) -> None:
        """Settings of the request that now owns ``row``."""
        self._temperature[row] = params.temperature
        self._top_k[row] = params.top_k or _UNLIMITED
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._filtered[row] = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
        self._seed[row] = params.seed or 0
        self.logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.prompt_logprobs[row] = (
            -1 if params.prompt_logprobs is None else params.prompt_logprobs
        )
        self._banned.pop(row, None)
        if params.min_tokens:
            self._banned[row] = (*self._eos, *params.stop_token_ids)
            self._free_from[row] = prompt_len + params.min_tokens

    def bans(self, batch: ScheduleBatch, requests: Int64Array) -> bool:
        """Whether a request must not end yet, so that some tokens are forbidden to it."""
        if not self._banned:
            return False
        rows, lengths = batch.req_pool_indices[requests], batch.seq_lens[requests]
        return any(
            row in self._banned and length < self._free_from[row]
            for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)
        )

    def sample(self, logits: Tensor, batch: ScheduleBatch, requests: Int64Array) -> Tensor:
        """One token per row.

        Args:
            logits: ``[S, V]`` device.
            batch: The pass.
            requests: ``[S]`` which requests of the batch the rows belong to.

        Returns:
            ``[S]`` int64 device; ``NOT_A_NUMBER`` where the logits are not finite.
        """
        rows = batch.req_pool_indices[requests]
        lengths = batch.seq_lens[requests]
        if self._banned:
            logits = self._ban(logits, rows, lengths)
        random = self._temperature[rows] > 0.0
        if not random.any():
            return sample_greedy(logits)
        filtered = self._filtered[rows]
        groups = (
            (~random, self._greedy),
            (random & ~filtered, self._plain),
            (random & filtered, self._with_filters),
        )
        tokens = logits.new_empty(logits.shape[0], dtype=torch.int64)
        for mask, choose in groups:
            index = np.flatnonzero(mask)
            if len(index):
                place = self._send(index)
                tokens[place] = choose(logits[place], rows[index], lengths[index])
        return tokens

    def _greedy(self, logits: Tensor, _rows: Int32Array, _lengths: Int32Array) -> Tensor:
        return sample_greedy(logits)

    def _plain(self, logits: Tensor, rows: Int32Array, lengths: Int32Array) -> Tensor:
        return sample_plain(logits, *self._draw(rows, lengths))

    def _with_filters(self, logits: Tensor, rows: Int32Array, lengths: Int32Array) -> Tensor:
        params = FilterParams(
            top_k=self._send(self._top_k[rows]),
            top_p=self._send(self._top_p[rows]),
            min_p=self._send(self._min_p[rows]),
        )
        return sample_filtered(logits, *self._draw(rows, lengths), params)

    def _draw(self, rows: Int32Array, lengths: Int32Array) -> tuple[Tensor, Tensor]:
        """Temperatures, and one uniform number each.

        The new token's position is the length before it joins.
        """
        u = uniform(self._seed[rows], lengths.astype(np.int64))
        return self._send(self._temperature[rows]), self._send(u)

    def _ban(self, logits: Tensor, rows: Int32Array, lengths: Int32Array) -> Tensor:
        """Make end tokens impossible for requests that have not reached ``min_tokens``."""
        pairs = [
            (index, token)
            for index, row in enumerate(rows.tolist())
            if row in self._banned and lengths[index] < self._free_from[row]
            for token in self._banned[row]
            if token < logits.shape[-1]
        ]
        if not pairs:
            return logits
        where = torch.tensor(pairs, device=self._device)
        logits = logits.clone()
        logits[where[:, 0], where[:, 1]] = float("-inf")
        return logits

    def _send(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
