# SPDX-License-Identifier: Apache-2.0
"""Roster: which request stands where, and what it owns.

Every move of a request between queue, row and end is made here, so that rows, slots and
locks are given back in one place.  The scheduler plans with it, the settling of a pass ends
requests with it.
"""

from __future__ import annotations

__all__ = ["Roster", "RowPool"]

import time
from typing import TYPE_CHECKING, Protocol

from bedplate.scheduling.decode_batch import DecodeBatch
from bedplate.scheduling.policy import pages_for
from bedplate.scheduling.request import Request, RequestState
from bedplate.scheduling.table import RequestTable
from bedplate.scheduling.waiting import WaitingQueue

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bedplate.scheduling.request import FinishReason
    from bedplate.scheduling.slot_source import SlotSource

    Int32Array = npt.NDArray[np.int32]
    Int64Array = npt.NDArray[np.int64]


class RowPool(Protocol):
    """What the roster needs of ``memory.ReqToTokenPool``."""

    table: Int32Array

    def alloc(self, count: int, /) -> Int32Array | None:
        """``[count]`` rows, or ``None``."""

    def free(self, rows: int, /) -> None:
        """Give one row back."""


class Roster:
    """See the module.

    Args:
        pool: Rows; all of them are free and ours.
        slots: Likewise.
        page_size: Tokens a page.
        max_running: Requests that may own rows at once.
        overlap: Decode passes find their input tokens on the device.

    Attributes:
        table: Columns of the running requests.
        decode: Those of them that decode.
        waiting: Requests without a row.
        extending: Requests whose prompt is not fully planned.
        blocked: The most urgent waiting request found no room, and nothing was freed since.
    """

    def __init__(
        self,
        pool: RowPool,
        slots: SlotSource,
        page_size: int,
        max_running: int,
        *,
        overlap: bool,
    ) -> None:
        self._pool = pool
        self._page = page_size
        self.slots = slots
        self.table = RequestTable(pool.table)
        self.decode = DecodeBatch(self.table, page_size, overlap=overlap)
        self.waiting = WaitingQueue()
        self.extending: list[Request] = []
        self._joining: list[Request] = []
        self._leaving: list[Request] = []
        self._num_rows: int = min(max_running, self.table.num_rows - 1)
        self._rows_left = self._num_rows
        self.blocked = False

    @property
    def num_running(self) -> int:
        """Requests that own a row."""
        return self._num_rows - self._rows_left

    def running(self) -> list[Request]:
        """Requests that own a row."""
        return [request for request in self.table.owners if request is not None]

    def preemptible(self) -> list[Request]:
        """Requests that may give way, if nothing is in flight."""
        states = (RequestState.EXTENDING, RequestState.DECODING)
        return [request for request in self.running() if request.state in states]

    def queue(self, request: Request) -> None:
        """Let a request wait."""
        self.waiting.push(request)
        self.blocked = False

    def admit(self, request: Request) -> bool:
        """Give the most urgent waiting request a row, if all its tokens find room now."""
        if not self._rows_left or not self._borrow(request):
            return False
        self.waiting.pop()
        rows = self._pool.alloc(1)
        assert rows is not None  # the pool has as many rows as we counted
        self._rows_left -= 1
        self.table.take(request, int(rows[0]), request.borrowed)
        request.state = RequestState.EXTENDING
        self.extending.append(request)
        if request.cached_tokens is None:
            request.cached_tokens = len(request.borrowed)
            request.admitted_s = time.monotonic()
        return True

    def expect_token(self, request: Request, length: int) -> None:
        """The prompt of a request is planned: it decodes next, unless it needs no more.

        Args:
            request: Leaves ``extending``.
            length: Its tokens, without the one that is expected.
        """
        self.extending.remove(request)
        if length + 1 >= request.max_len:
            request.state = RequestState.ENDING
        else:
            request.state = RequestState.JOINING
            self._joining.append(request)

    def expect_last(self, rows: Int64Array) -> None:
        """These decode for the last time in the pass just planned."""
        owners = self.table.owners
        self._leaving += [owner for row in rows if (owner := owners[row]) is not None]

    def regroup(self) -> None:
        """Let requests join or leave the decode batch; called before a pass is planned."""
        for request in self._joining:
            if request.state is RequestState.JOINING:
                request.state = RequestState.DECODING
                self.decode.add(request.row)
        for request in self._leaving:
            if request.state is RequestState.DECODING:
                request.state = RequestState.ENDING
                self.decode.remove(request.row)
        self._joining.clear()
        self._leaving.clear()

    def preempt(self, request: Request) -> None:
        """Back to the queue: its tokens so far are what it computes when it returns."""
        self._leave_row(request, keep=True)
        request.preemptions += 1
        self.waiting.push(request)

    def finish(
        self,
        request: Request,
        reason: FinishReason,
        stop_reason: int | str | None = None,
        error: str = "",
    ) -> None:
        """End a request wherever it stands; a finished one is left alone."""
        if request.finished:
            return
        if request.state is RequestState.WAITING:
            self.waiting.forget()
        else:
            self._leave_row(request, keep=reason != "error")
        request.state = RequestState.FINISHED
        request.output = request.tokens[request.prompt_len :]
        request.finish_reason, request.stop_reason = reason, stop_reason
        request.error = error
        request.finished_s = time.monotonic()

    def _borrow(self, request: Request) -> bool:
        """Lock the cached prefix of a request, if the rest fits beside the others."""
        total = len(request.tokens)
        most = total - 1  # one token is computed, so that there are logits
        if request.params.prompt_logprobs is not None:
            most = min(most, request.scored)
        self.slots.borrow(request, most)
        if not (self.decode.size or self.extending or self._joining):
            return True
        # One more page for each that decodes, or it would be in the way at once.
        pages = pages_for(total - len(request.borrowed), self._page) + self.decode.size
        if pages * self._page <= self.slots.free_size():
            return True
        self.slots.give_up(request)
        return False

    def _leave_row(self, request: Request, *, keep: bool) -> None:
        """Take row and slots from a request; its good pages may stay in the cache."""
        row = request.row
        if request.state is RequestState.DECODING:
            self.decode.remove(row)
        elif request.state is RequestState.EXTENDING:
            self.extending.remove(request)
        slots = self.table.slots_of(row, 0, int(self.table.seq_len[row])).copy()
        request.tokens = self.table.leave(request)
        good = len(request.tokens) - 1 if keep and request.ready else 0
        self.slots.release(request, request.tokens[:good], slots)
        self._pool.free(row)
        self._rows_left += 1
        request.ready = False
        self.blocked = False
