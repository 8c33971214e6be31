# SPDX-License-Identifier: Apache-2.0
"""ModelExecutor: runs the scheduler's batches with a model and brings the tokens back.

Implements ``batch.step.StepExecutor``.  Nothing here waits for the device except
``PendingStep.wait``: sampled tokens stay in a device table, one entry per request row, where
the next step finds them.

Shapes: B requests, R rows of logits, S rows that sample.
"""

from __future__ import annotations

__all__ = ["ModelExecutor"]

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bedplate.batch.logits_rows import LogitsRows, select_logits_rows
from bedplate.batch.step import StepOutput, TokenLogprobs
from bedplate.reference.sampling import NOT_A_NUMBER, logprobs_of
from bedplate.runner.sampler import Sampler
from bedplate.runner.staging import Staging

if TYPE_CHECKING:
    import numpy.typing as npt

    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.batch.logits import LogitsOutput
    from bedplate.batch.schedule_batch import ScheduleBatch
    from bedplate.contract.runtime import Event
    from bedplate.runner.model_runner import ModelRunner
    from bedplate.runner.sampling_params import SamplingParams
    from bedplate.runner.shadow import Shadow

    Int64Array = npt.NDArray[np.int64]

_BAD_LOGITS = (
    "the model's logits are not numbers for this request; try --dtype float32, and if that "
    "does not help, look for tensors that are not finite in the checkpoint"
)


class ModelExecutor:
    """One model on one device.

    Args:
        runner: An initialized ``ModelRunner``.
        eos_token_ids: Tokens that ``min_tokens`` forbids, besides a request's own.
        shadow: Looks on, where one is asked for.
    """

    def __init__(
        self,
        runner: ModelRunner,
        eos_token_ids: tuple[int, ...],
        shadow: Shadow | None = None,
    ) -> None:
        memory = runner.bound.capabilities.memory
        self._runner = runner
        self._shadow = shadow
        self._runtime = runner.bound.runtime
        self._asynchronous = memory.asynchronous
        table = runner.req_to_token_pool.req_to_token
        self._staging = Staging(
            self._runtime, table, getattr(torch, memory.index_dtype), unified=memory.unified
        )
        self._sampler = Sampler(table.shape[0], eos_token_ids, self._runtime.device)
        self._loop = runner.decode_loop
        self._last_tokens = (
            torch.zeros(table.shape[0], dtype=torch.int64, device=self._runtime.device)
            if self._loop is None
            else self._loop.last_tokens
        )

    @property
    def asynchronous(self) -> bool:
        """Whether the device works on while the host plans."""
        return self._asynchronous

    def set_request(self, row: int, params: SamplingParams, prompt_len: int) -> None:
        """Sampling settings of the request that now owns ``row``."""
        self._sampler.set_request(row, params, prompt_len)
        if self._loop is not None:
            self._loop.set_request(row, params)

    def idle(self) -> bool:
        """Use a moment without work; whether more is to do."""
        return self._runner.idle()

    def launch(self, batch: ScheduleBatch) -> _Pending:
        """Queue one pass."""
        with self._runtime.inference_guard():
            if self._loop is not None:
                self._loop.send_settings()
            watched = self._shadow is not None and self._shadow.due()
            resident = None if watched else self._runner.load_decode(batch)
            if resident is not None:
                return self._queue(batch, resident, None)
            wanted = None
            if batch.extend_seq_lens is not None:
                wanted = select_logits_rows(batch.extend_seq_lens, batch.prompt_logprob_start)
            staged = self._staging.stage(batch, None if wanted is None else wanted.rows)
            if batch.token_on_device is not None:
                staged = self._fill_tokens(staged, batch)
            return self._queue(batch, staged, wanted, watched=watched)

    def _queue(
        self,
        batch: ScheduleBatch,
        forward_batch: ForwardBatch,
        wanted: LogitsRows | None,
        *,
        watched: bool = False,
    ) -> _Pending:
        """Run a pass that is on the device, and send its tokens back."""
        output, graph, reason = self._run(forward_batch, watched=watched)
        logits = output.next_token_logits
        requests = _sampling(batch)
        own = _sampled_rows(logits, wanted, requests)
        tokens = self._tokens(output.tokens, own, batch, forward_batch, requests)
        on_host = self._to_host(tokens)
        logprobs = self._logprobs(own, tokens, batch, requests)
        prompt = {} if wanted is None else self._prompt_logprobs(logits, batch, wanted)
        return _Pending(
            batch_size=batch.batch_size,
            requests=requests,
            tokens=on_host,
            event=self._runtime.record_event(),  # behind all copies to the host
            logprobs=logprobs,
            prompt=prompt,
            graph=graph,
            graph_reason=reason,
        )

    def _run(
        self, batch: ForwardBatch, *, watched: bool
    ) -> tuple[LogitsOutput, int | None, str]:
        """As ``ModelRunner.run``, unless the shadow runs it too."""
        if watched and self._shadow is not None:
            output = self._shadow.run(batch)
            if output is not None:
                return output, None, "the shadow looks on"
        return self._runner.run(batch)

    def _tokens(
        self,
        sampled: Tensor | None,
        logits: Tensor,
        batch: ScheduleBatch,
        forward_batch: ForwardBatch,
        requests: Int64Array,
    ) -> Tensor:
        """``[S]``: what the pass sampled itself, unless a request forbids tokens now."""
        if self._sampler.bans(batch, requests):
            sampled = None
        elif sampled is None and self._loop is not None:
            rows, lens = forward_batch.req_pool_indices, forward_batch.seq_lens
            if len(requests) != len(rows):
                chosen = _to(requests, rows)
                rows, lens = rows[chosen], lens[chosen]
            return self._loop.sample(logits, rows, lens)
        if sampled is None:
            sampled = self._sampler.sample(logits, batch, requests)
            self._keep(sampled, forward_batch, requests)
        return sampled

    def _fill_tokens(self, forward_batch: ForwardBatch, batch: ScheduleBatch) -> ForwardBatch:
        """Take the input tokens that have not reached the host from the device's table."""
        flags = batch.token_on_device
        assert flags is not None
        device = forward_batch.input_ids.device
        latest = self._last_tokens[forward_batch.req_pool_indices.long()]
        if batch.extend_seq_lens is None:
            if flags.all():
                return replace(forward_batch, input_ids=latest)
            known = torch.from_numpy(~flags).to(device, non_blocking=True)
            return replace(
                forward_batch, input_ids=torch.where(known, forward_batch.input_ids, latest)
            )
        ends = np.cumsum(batch.extend_seq_lens, dtype=np.int64) - 1
        chosen = torch.from_numpy(np.flatnonzero(flags)).to(device, non_blocking=True)
        places = torch.from_numpy(ends[flags]).to(device, non_blocking=True)
        return replace(
            forward_batch,
            input_ids=forward_batch.input_ids.index_copy(0, places, latest[chosen]),
        )

    def _keep(self, tokens: Tensor, forward_batch: ForwardBatch, requests: Int64Array) -> None:
        rows = forward_batch.req_pool_indices
        if len(requests) != len(rows):
            rows = rows[_to(requests, rows)]
        self._last_tokens.index_copy_(0, rows.long(), tokens.clamp(min=0))

    def _to_host(self, tensor: Tensor) -> Tensor:
        """Queue a copy to the host; there once the event that is recorded next has come."""
        if tensor.device.type == "cpu":
            return tensor
        host = self._runtime.empty_host(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        host.copy_(tensor, non_blocking=True)
        return host

    def _logprobs(
        self, logits: Tensor, tokens: Tensor, batch: ScheduleBatch, requests: Int64Array
    ) -> _Logprobs | None:
        wanted = self._sampler.logprobs[batch.req_pool_indices[requests]]
        index = np.flatnonzero(wanted >= 0)
        if not len(index):
            return None
        chosen = _to(index, logits)
        parts = logprobs_of(logits[chosen], tokens[chosen], int(wanted.max()))
        return self._sent(requests[index], wanted[index], tokens[chosen], *parts)

    def _sent(self, requests: Int64Array, top: Int64Array, *tensors: Tensor) -> _Logprobs:
        tokens, own, best, ids = map(self._to_host, tensors)
        return _Logprobs(requests, top, (tokens, own, best, ids))

    def _prompt_logprobs(
        self, logits: Tensor, batch: ScheduleBatch, wanted: LogitsRows
    ) -> dict[int, _Logprobs]:
        starts = batch.prompt_logprob_start
        if starts is None or batch.extend_seq_lens is None:
            return {}
        found = {}
        ends = np.cumsum(batch.extend_seq_lens, dtype=np.int64)
        for request in np.flatnonzero(starts >= 0).tolist():
            end, count = int(ends[request]), int(batch.extend_seq_lens[request])
            begin = end - count + int(starts[request])
            targets = batch.input_ids[begin + 1 : end]
            if batch.next_prompt_token is not None and batch.next_prompt_token[request] >= 0:
                targets = np.append(targets, batch.next_prompt_token[request])
            if not len(targets):
                continue
            places = np.searchsorted(wanted.rows, np.arange(begin, begin + len(targets)))
            tokens = torch.from_numpy(np.ascontiguousarray(targets)).to(logits.device)
            top = max(0, int(self._sampler.prompt_logprobs[batch.req_pool_indices[request]]))
            parts = logprobs_of(logits[_to(places, logits)], tokens, top)
            count = len(targets)
            found[request] = self._sent(
                np.full(count, request), np.full(count, top), tokens, *parts
            )
        return found


def _sampling(batch: ScheduleBatch) -> Int64Array:
    """Rows of the batch that sample."""
    if batch.sample is None:
        return np.arange(batch.batch_size, dtype=np.int64)
    return np.flatnonzero(batch.sample)


def _sampled_rows(logits: Tensor, wanted: LogitsRows | None, requests: Int64Array) -> Tensor:
    """``[S, V]``: the logits that the requests sample from."""
    rows = requests if wanted is None else wanted.sample[requests]
    return logits if len(rows) == len(logits) else logits[_to(rows, logits)]


def _to(index: Int64Array, like: Tensor) -> Tensor:
    return torch.from_numpy(index).to(like.device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Logprobs:
    """Log-probabilities on their way to the host.

    Attributes:
        requests: ``[n]`` rows of the batch.
        top: ``[n]`` how many of the best each row asked for.
        tensors: tokens ``[n]``, own ``[n]``, best ``[n, k]``, ids ``[n, k]``; host.
    """

    requests: Int64Array
    top: Int64Array
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]

    def read(self) -> list[TokenLogprobs]:
        """One entry per row; after the step's event."""
        tokens, own, best, ids = (tensor.tolist() for tensor in self.tensors)
        return [
            TokenLogprobs(
                token_id=token, logprob=value, top=tuple(zip(i[:k], b[:k], strict=True))
            )
            for token, value, b, i, k in zip(
                tokens, own, best, ids, self.top.tolist(), strict=True
            )
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """Tokens on their way to the host."""

    batch_size: int
    requests: Int64Array
    tokens: Tensor
    event: Event
    logprobs: _Logprobs | None
    prompt: dict[int, _Logprobs]
    graph: int | None
    graph_reason: str

    def ready(self) -> bool:
        """Whether the tokens have arrived."""
        return self.event.query()

    def wait(self) -> StepOutput:
        """The tokens, once they have arrived."""
        self.event.synchronize()
        tokens = np.full(self.batch_size, -1, np.int64)
        tokens[self.requests] = self.tokens.numpy()
        errors = None
        bad = tokens == NOT_A_NUMBER
        if bad.any():
            errors = dict.fromkeys(np.flatnonzero(bad).tolist(), _BAD_LOGITS)
            tokens[bad] = -1
        logprobs = None
        if self.logprobs is not None:
            rows = self.logprobs.requests.tolist()
            logprobs = dict(zip(rows, self.logprobs.read(), strict=True))
        prompt = {row: part.read() for row, part in self.prompt.items()}
        return StepOutput(
            next_token_ids=tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt or None,
            errors=errors,
            graph=self.graph,
            graph_reason=self.graph_reason,
        )
