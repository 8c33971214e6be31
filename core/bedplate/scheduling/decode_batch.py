# SPDX-License-Identifier: Apache-2.0
"""DecodeBatch: the arrays of the next decode pass, kept from step to step.

A step advances all members in place; a request that joins or leaves costs one column of a
few small arrays, whatever the size of the batch.  The order of members has no meaning, but
the longest stand first, more or less: attention on a device begins its work in order of the
rows, and what takes longest must not begin last.  Used by the scheduler only.
"""

from __future__ import annotations

__all__ = ["DecodeBatch"]

from typing import TYPE_CHECKING

import numpy as np

from bedplate.batch.forward_mode import ForwardMode
from bedplate.batch.schedule_batch import ScheduleBatch
from bedplate.scheduling.table import NO_STOP

if TYPE_CHECKING:
    import numpy.typing as npt

    from bedplate.scheduling.table import RequestTable

    Int32Array = npt.NDArray[np.int32]
    Int64Array = npt.NDArray[np.int64]


_SORTED_FROM = 64
"""Attention cuts the requests of smaller batches into several pieces of work each."""
_MOVES_A_SORT = 1 / 8
"""Members are sorted when so large a share of them has moved: each sort sends all of them to
the device, which is then eight rows for a member that joined or left."""


class DecodeBatch:
    """Rows that decode, and their arrays.

    The array attributes are views of B entries; those of composition (``rows`` …) are
    replaced, never changed, when a member joins or leaves, so a step in flight may keep them.

    Attributes:
        size: B.
        epoch: Changes with every member that joins or leaves.
        rows: ``[B]`` int32.
        row_index: ``[B]`` the same as int64, which indexing wants.
        serials: ``[B]`` int64, of the table at the time of joining.
        numbers: ``[B]`` int64 arrival numbers.
        batch: The decode pass, made of the arrays here.
        seq_lens: ``[B]`` int32 in place; length after the pass planned last.
        slots: ``[B]`` int32 in place; slot of the last token.
        positions: ``[B]`` int64 in place.
        input_ids: ``[B]`` int64 in place; next input, as far as the host knows it.
        flat: ``[B]`` int64 in place; index of the last slot in the flat table.
        stops: ``W`` arrays ``[B]`` int64.
        index_of: ``[R]`` int32; member index of a row, −1 for no member.
        steps_left: Decode steps for which certainly no member reaches its length.
        steps_in_page: Decode steps for which certainly no member needs another page.
    """

    def __init__(self, table: RequestTable, page_size: int, *, overlap: bool) -> None:
        capacity = table.num_rows
        self._table = table
        self._page = page_size
        self._overlap = overlap
        self._int32 = np.zeros((3, capacity), np.int32)
        self._int64 = np.zeros((3, capacity), np.int64)
        self._stops = np.full((1, capacity), NO_STOP, np.int64)
        self._true = np.ones(capacity, np.bool_)
        self.index_of = np.full(capacity, -1, np.int32)
        self.steps_left = 0
        self.steps_in_page = 0
        self.size = 0
        self.epoch = 0
        self._stale = True
        self._moves = 0
        self.refresh()

    def add(self, row: int) -> None:
        """Let a row take part from the next pass on; its last slot is already set."""
        table, i = self._table, self.size
        length = int(table.seq_len[row])
        flat = row * table.stride + length - 1
        self._int32[:, i] = (row, length, table.slots[flat])
        self._int64[:, i] = (length - 1, flat, table.flat_tokens[flat + 1])
        if len(table.stops) != len(self._stops):
            self._restop()
        self._stops[:, i] = table.stops[:, row]
        self.index_of[row] = i
        left, in_page = int(table.max_len[row]) - 1 - length, -length % self._page
        self.steps_left = left if i == 0 else min(self.steps_left, left)
        self.steps_in_page = in_page if i == 0 else min(self.steps_in_page, in_page)
        self.size += 1
        self._changed()

    def remove(self, row: int) -> None:
        """Let the last member take the place of a row."""
        i, last = int(self.index_of[row]), self.size - 1
        self.index_of[row] = -1
        if i != last:
            self._int32[:, i] = self._int32[:, last]
            self._int64[:, i] = self._int64[:, last]
            self._stops[:, i] = self._stops[:, last]
            self.index_of[self._int32[0, i]] = i
        self.size = last
        self._changed()

    def advance(self, slots: Int32Array) -> None:
        """Every member gets one more token, at ``slots``.

        ``seq_lens`` was already raised by the caller, who needed it to get the slots.
        """
        self.slots[:] = slots
        self._places += 1
        table = self._table
        table.slots[self.flat] = slots
        table.seq_len[self.row_index] = self.seq_lens
        self.steps_left -= 1
        if self.steps_in_page > 0:
            self.steps_in_page -= 1
        elif self.size < self._page:  # in a larger batch somebody soon needs a page again
            self.steps_in_page = int((-self.seq_lens % self._page).min())

    def ending(self) -> Int64Array | None:
        """Members for which the pass just planned is the last; ``None`` = nobody."""
        if self.steps_left > 0:
            return None
        left = self._table.max_len[self.row_index] - 1 - self.seq_lens
        ends = np.flatnonzero(left <= 0)
        rest = left[left > 0]
        self.steps_left = int(rest.min()) if len(rest) else 0
        return ends if len(ends) else None

    def feed(self, rows: Int64Array, tokens: Int64Array) -> None:
        """Tell members the values of their next inputs; rows that left are skipped."""
        index = self.index_of[rows]
        here = index >= 0
        self._int64[2, index[here]] = tokens[here]

    def refresh(self) -> None:
        """Renew the views after members joined or left."""
        if not self._stale:
            return
        self._stale = False
        if self.size >= _SORTED_FROM and self._moves > self.size * _MOVES_A_SORT:
            self._sort()
        n, table = self.size, self._table
        self.rows = self._int32[0, :n].copy()
        self.row_index = self.rows.astype(np.int64)
        self.serials = table.serial[self.row_index]
        self.numbers = table.number[self.row_index]
        self.seq_lens, self.slots = self._int32[1, :n], self._int32[2, :n]
        self.positions, self.flat, self.input_ids = self._int64[:, :n]
        self._places = self._int64[:2, :n]
        self.stops = tuple(column[:n] for column in self._stops)
        self.batch = ScheduleBatch(
            mode=ForwardMode.DECODE,
            req_pool_indices=self.rows,
            seq_lens=self.seq_lens,
            input_ids=self.input_ids,
            positions=self.positions,
            out_cache_loc=self.slots,
            token_on_device=self._true[:n] if self._overlap else None,
        )

    def _changed(self) -> None:
        self.epoch += 1
        self._moves += 1
        self._stale = True

    def _sort(self) -> None:
        """Let the longest stand first."""
        self._moves = 0
        order = np.argsort(-self._int32[1, : self.size], kind="stable")
        for columns in (self._int32, self._int64, self._stops):
            columns[:, : self.size] = columns[:, order]
        self.index_of[self._int32[0, : self.size]] = np.arange(self.size)

    def _restop(self) -> None:
        """The table has wider stop columns now."""
        self._stops = np.full((len(self._table.stops), self._table.num_rows), NO_STOP, np.int64)
        members = self._int32[0, : self.size]
        self._stops[:, : self.size] = self._table.stops[:, members]
