# SPDX-License-Identifier: Apache-2.0
"""RequestTable: the running requests as columns, indexed by request row.

Rows are those of ``req_to_token``; row 0 is padding and never used.  Everything that a step
touches for every request is a column here, so that a step costs a few array operations
however many requests there are.  Only the scheduler writes it.
"""

from __future__ import annotations

__all__ = ["NO_STOP", "RequestTable"]

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from bedplate.scheduling.request import Request

NO_STOP = -2
"""Fills unused places of the stop columns; equal to no token, nor to −1 (not sampled)."""


class RequestTable:
    """Columns of the running requests; ``R`` rows, row 0 included.

    Args:
        req_to_token: ``[R, C]`` int32 host, contiguous: slot of each token of each request.
            Shared with its pool; the scheduler writes it.

    Attributes:
        slots: Flat view of ``req_to_token``.
        tokens: ``[R, C]`` int32; prompt and generated tokens of each row.
        flat_tokens: Flat view of it.
        seq_len: ``[R]`` int32; tokens that have slots, those in flight included.
        known_len: ``[R]`` int32; tokens whose value has reached the host.
        max_len: ``[R]`` int32; length at which the request ends.
        serial: ``[R]`` int64; grows whenever a row changes hands, so that late results of
            a former owner are recognised.
        number: ``[R]`` int64; arrival number of the owner.
        stops: ``[W, R]`` int64; tokens that end the owner, padded with ``NO_STOP``.
        owners: The owner of each row.
    """

    def __init__(self, req_to_token: npt.NDArray[np.int32]) -> None:
        rows, columns = req_to_token.shape
        self.stride = columns
        self.num_rows: int = rows
        self.slots = req_to_token.reshape(-1)
        self.tokens = np.zeros((rows, columns), np.int32)
        self.flat_tokens = self.tokens.reshape(-1)
        self.seq_len = np.zeros(rows, np.int32)
        self.known_len = np.zeros(rows, np.int32)
        self.max_len = np.zeros(rows, np.int32)
        self.serial = np.zeros(rows, np.int64)
        self.number = np.zeros(rows, np.int64)
        self.stops = np.full((1, rows), NO_STOP, np.int64)
        self.owners: list[Request | None] = [None] * rows

    def take(self, request: Request, row: int, prefix: npt.NDArray[np.int32]) -> None:
        """Give ``row`` to a request and fill its columns from it.

        Args:
            request: The new owner.
            row: Its row.
            prefix: ``[n]`` int32 slots of the tokens that it need not compute.
        """
        length = len(request.tokens)
        self.tokens[row, :length] = request.tokens
        self.seq_len[row] = 0
        self.extend(row, prefix)
        self.known_len[row] = length
        self.max_len[row] = request.max_len
        self.number[row] = request.number
        self._set_stops(row, request.stop_ids)
        self.owners[row] = request
        request.row = row

    def extend(self, row: int, slots: npt.NDArray[np.int32]) -> None:
        """Note the slots of a row's next tokens."""
        start = int(self.seq_len[row])
        self.slots_of(row, start, start + len(slots))[:] = slots
        self.seq_len[row] = start + len(slots)

    def leave(self, request: Request) -> npt.NDArray[np.int32]:
        """Take the row from its owner.

        Returns:
            ``[n]`` int32 copy of all its known tokens.
        """
        row = request.row
        tokens = self.tokens[row, : self.known_len[row]].copy()
        self.serial[row] += 1
        self.owners[row] = None
        request.row = 0
        return tokens

    def slots_of(self, row: int, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Slots of the tokens ``start … stop`` of a row; a view."""
        base = row * self.stride
        return self.slots[base + start : base + stop]

    def _set_stops(self, row: int, stop_ids: tuple[int, ...]) -> None:
        missing = len(stop_ids) - len(self.stops)
        if missing > 0:
            more = np.full((missing, self.num_rows), NO_STOP, np.int64)
            self.stops = np.concatenate([self.stops, more])
        self.stops[:, row] = NO_STOP
        self.stops[: len(stop_ids), row] = stop_ids
