# SPDX-License-Identifier: Apache-2.0
"""DecodeLoop: decode passes that are recorded whole, from the next input to the next token.

A recorded pass begins by moving its rows on (``advance_decode``) and ends by sampling
(``sample_tokens``), so a step whose members stay is one launch: the host sends what does not
follow from the step before, a new page's first slot or a new member, and nothing if there is
no such thing.  The host keeps a mirror of what the device has and sends differences.

Owned by ``ModelRunner``; ``ModelExecutor`` drives it.

Shapes: B requests, R request rows, V vocabulary.
"""

from __future__ import annotations

__all__ = ["DecodeLoop", "decode_requests"]

from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from bedplate.batch.forward_batch import ForwardBatch
from bedplate.batch.forward_mode import ForwardMode
from bedplate.contract.ops import OpRequest
from bedplate.reference.decode_step import CHANGE_WIDTH, HEADER_WIDTH, DecodeRows
from bedplate.reference.sampling import SamplingTables
from bedplate.runner.host_buffers import HostBuffers

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    from torch import Tensor

    from bedplate.batch.logits import LogitsOutput
    from bedplate.batch.schedule_batch import ScheduleBatch
    from bedplate.contract.ops import OpRegistry
    from bedplate.contract.runtime import DeviceRuntime
    from bedplate.graph.runner import GraphRunner
    from bedplate.runner.sampling_params import SamplingParams

    Forward = Callable[[ForwardBatch], LogitsOutput]
    Int32Array = npt.NDArray[np.int32]

_SETTING_BYTES = 8
"""Room for one value, whatever its dtype."""


class DecodeLoop:
    """State of recorded decode passes beside the graph's own slots.

    Args:
        runtime: The device.
        ops: Provide ``advance_decode`` and ``sample_tokens``.
        req_to_token: ``[R, C]`` int32, the device's table of slots.
        max_batch_size: Most rows of a pass.
        fill_len: Length of padding rows.
        dtype: Name of the logits' dtype.

    Attributes:
        last_tokens: ``[R]`` int64 device; the token sampled last for each request row.
        tables: Sampling settings of each request row; device.
        sent_bytes: Bytes sent to the device so far.
    """

    def __init__(
        self,
        runtime: DeviceRuntime,
        ops: OpRegistry,
        req_to_token: Tensor,
        *,
        max_batch_size: int,
        fill_len: int,
        dtype: str,
    ) -> None:
        self._runtime = runtime
        self._dtype = dtype
        self._advance, self._sample = (
            ops.choose(request).call for request in decode_requests(dtype)
        )
        self._req_to_token = req_to_token
        self._fill_len = fill_len
        rows, device = req_to_token.shape[0], runtime.device
        self.last_tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.tables = _greedy_tables(rows, device)
        self._new_settings: dict[int, tuple[float, int, float, float, int]] = {}
        size = HEADER_WIDTH + CHANGE_WIDTH * max_batch_size
        self._changes = torch.zeros(size, dtype=torch.int32, device=device)
        self._host = HostBuffers(runtime, size * 4)
        columns = 1 + len(fields(SamplingTables))
        self._host_settings = HostBuffers(runtime, _SETTING_BYTES * columns * rows)
        self._header = (0, 0, 0)
        self._mirror = np.zeros((3, max_batch_size), np.int32)
        self._count = 0
        self._generation = -1
        self.sent_bytes = 0

    def begin(self, batch: ForwardBatch) -> None:
        """Move the rows that ``batch`` reads on; the first thing that a graph records."""
        rows = DecodeRows(**{f.name: getattr(batch, f.name) for f in fields(DecodeRows)})
        self._advance(self._changes, rows, self._req_to_token, self.last_tokens, self._fill_len)

    def sampled(self, forward: Forward) -> Forward:
        """The model's pass with sampling behind it: the rest of what a graph records."""

        def run(batch: ForwardBatch) -> LogitsOutput:
            output = forward(batch)
            logits = output.next_token_logits
            tokens = self.sample(logits, batch.req_pool_indices, batch.seq_lens)
            return replace(output, tokens=tokens)

        return run

    def sample(self, logits: Tensor, rows: Tensor, seq_lens: Tensor) -> Tensor:
        """``[S]`` int64 tokens of logits ``[S, V]``, kept as the last of their requests."""
        tokens: Tensor = self._sample(logits, rows, seq_lens, self.tables, self.last_tokens)
        return tokens

    def set_request(self, row: int, params: SamplingParams) -> None:
        """Settings of the request that now owns ``row``; sent before the next pass."""
        seed = int(np.uint64(params.seed or 0).view(np.int64))
        self._new_settings[row] = (
            params.temperature, params.top_k, params.top_p, params.min_p, seed
        )  # fmt: skip

    def send_settings(self) -> None:
        """Bring the settings of new requests to the device."""
        if not self._new_settings:
            return
        tables = [getattr(self.tables, field.name) for field in fields(SamplingTables)]
        columns = (tuple(self._new_settings), *zip(*self._new_settings.values(), strict=True))
        dtypes = (torch.int64, *(table.dtype for table in tables))
        count = len(self._new_settings)
        host = self._host_settings.take(len(columns) * count * _SETTING_BYTES)
        host = host.view(len(columns), -1)
        for row, values, dtype in zip(host, columns, dtypes, strict=True):
            row.view(dtype)[:count] = torch.tensor(values, dtype=dtype)
        sent = host.to(self._runtime.device, non_blocking=True)
        self._host_settings.sent()
        rows, *settings = (
            row.view(dtype)[:count] for row, dtype in zip(sent, dtypes, strict=True)
        )
        for table, values in zip(tables, settings, strict=True):
            table.index_copy_(0, rows, values)
        self.sent_bytes += host.nbytes
        self._new_settings.clear()

    def load(self, batch: ScheduleBatch, runner: GraphRunner) -> ForwardBatch:
        """Bring the device's rows to ``batch``; the batch that ``runner`` replays for it.

        The device moves its rows on when the pass runs, so only what differs from that is
        sent.
        """
        resident = runner.resident(batch.batch_size)
        changed = self._differences(batch, runner.generation)
        header = (batch.batch_size, len(changed), 0)
        if len(changed) or header != self._header:
            self._send(header, changed)
        resident.seq_lens_cpu.numpy()[:] = batch.seq_lens
        return resident

    def hold(self) -> None:
        """Let the next pass leave the rows alone: they are loaded from another batch."""
        self._generation = -1
        if not self._header[2]:
            self._send((0, 0, 1), np.zeros(0, np.int64))

    def try_out(self, vocab_size: int) -> None:
        """Call both operations on a few made-up rows; for a loop that nobody else uses.

        Rows are set, then moved on; every second one samples, the others are greedy.
        """
        size = min(self._mirror.shape[1], len(self.last_tokens) - 1)
        rows, device = np.arange(1, size + 1), self._runtime.device
        self._mirror[:, :size] = rows, rows, rows * 16
        batch = _empty_decode(size, device)
        for changed in (rows - 1, rows[:0]):
            self._send((size, len(changed), 0), changed)
            self.begin(batch)
        self.tables.temperature[::2] = 0.8
        logits = torch.randn(size, vocab_size, generator=torch.Generator().manual_seed(0))
        logits = logits.to(device, getattr(torch, self._dtype))
        self.sample(logits, batch.req_pool_indices, batch.seq_lens)

    def _differences(self, batch: ScheduleBatch, generation: int) -> npt.NDArray[np.int64]:
        """Places where the device's rows, moved on by one token, are not those of ``batch``."""
        count = batch.batch_size
        wanted = (batch.req_pool_indices, batch.seq_lens, batch.out_cache_loc)
        mirror = self._mirror
        if generation != self._generation:
            mirror[:] = 0
            self._generation = generation
        rows, lens, slots = mirror[:, :count]
        lens += 1
        slots += 1
        same = rows == wanted[0]
        same &= lens == wanted[1]
        same &= slots == wanted[2]
        changed = np.flatnonzero(~same)
        if len(changed):
            rows[:], lens[:], slots[:] = wanted
        mirror[:, count : self._count] = 0
        self._count = count
        return changed

    def _send(self, header: tuple[int, int, int], changed: npt.NDArray[np.int64]) -> None:
        size = HEADER_WIDTH + CHANGE_WIDTH * len(changed)
        host = self._host.take(size * 4).view(torch.int32)
        packed = host.numpy()
        packed[:3] = header
        table = packed[HEADER_WIDTH:].reshape(-1, CHANGE_WIDTH)
        table[:, 0] = changed
        table[:, 1:] = self._mirror[:, changed].T
        self._changes[:size].copy_(host, non_blocking=True)
        self._host.sent()
        self._header = header
        self.sent_bytes += size * 4


def _empty_decode(size: int, device: torch.device) -> ForwardBatch:
    """A decode pass whose rows are zeros."""

    def zeros(dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    return ForwardBatch(
        mode=ForwardMode.DECODE,
        batch_size=size,
        input_ids=zeros(torch.int64),
        positions=zeros(torch.int64),
        req_pool_indices=zeros(torch.int32),
        seq_lens=zeros(torch.int32),
        seq_lens_cpu=torch.zeros(size, dtype=torch.int32),
        out_cache_loc=zeros(torch.int32),
    )


def decode_requests(dtype: str) -> tuple[OpRequest, OpRequest]:
    """What a loop asks of the registry: to move rows on, and to sample."""
    return (
        OpRequest(op="advance_decode", dtype="int32"),
        OpRequest(op="sample_tokens", dtype=dtype),
    )


def _greedy_tables(rows: int, device: torch.device) -> SamplingTables:
    def full(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    return SamplingTables(
        temperature=full(0.0, torch.float32),
        top_k=full(0, torch.int32),
        top_p=full(1.0, torch.float32),
        min_p=full(0.0, torch.float32),
        seed=full(0, torch.int64),
    )
