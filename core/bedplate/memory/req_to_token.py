# SPDX-License-Identifier: Apache-2.0
"""ReqToTokenPool: the slot of each token of each running request.

The host's table is what the scheduler writes and reads; the device's table is what attention
reads, and it is brought up to date inside the step's staging copy.  Where host and device
address the same memory both are one.  Row 0 belongs to padding and stays zero: slot 0.
"""

from __future__ import annotations

__all__ = ["ReqToTokenPool"]

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from bedplate.errors import ContractError
from bedplate.memory.free_list import FreeList, Int32Array

if TYPE_CHECKING:
    from torch import Tensor

    Index = int | slice | npt.NDArray[np.integer]


class ReqToTokenPool:
    """Rows 1…size of a table of slots.

    Args:
        size: Requests that can hold a row at once.
        max_context_len: Tokens a row can hold.
        device: Where the device's table lies.
        unified: Whether the device reads host memory: then there is one table.

    Attributes:
        table: ``[size + 1, max_context_len]`` int32 on the host.
        req_to_token: The same shape and dtype on the device; shares ``table``'s memory when
            ``unified``, else starts as zeros and is written by the step.

    Raises:
        ContractError: A size is below 1.
    """

    def __init__(
        self,
        size: int,
        max_context_len: int,
        device: torch.device | str = "cpu",
        *,
        unified: bool = False,
    ) -> None:
        if size < 1 or max_context_len < 1:
            raise ContractError(
                f"a table of {size} requests of {max_context_len} tokens: both must be at "
                "least 1"
            )
        self.size = size
        self.max_context_len = max_context_len
        self.table: Int32Array = np.zeros((size + 1, max_context_len), dtype=np.int32)
        self.req_to_token: Tensor = (
            torch.from_numpy(self.table)
            if unified
            else torch.zeros(self.table.shape, dtype=torch.int32, device=device)
        )
        self._rows = FreeList(size, noun="request row")

    @property
    def available_size(self) -> int:
        """Rows that could be allocated now."""
        return self._rows.num_free

    def alloc(self, count: int) -> Int32Array | None:
        """``[count]`` int32 rows, or ``None`` (and nothing changes) if fewer are free.

        A row still holds what its last owner wrote; only columns that were written count.
        """
        return self._rows.alloc(count)

    def free(self, rows: Int32Array | int) -> None:
        """Give back one row or several; all are checked before anything changes.

        Raises:
            ContractError: A row is 0, out of range, already free, or named twice.
        """
        self._rows.free(np.array(rows, dtype=np.int32, ndmin=1))

    def write(self, rows: Index, columns: Index, values: Int32Array | int) -> None:
        """Store slots in the host's table, ``table[rows, columns] = values``.

        Args:
            rows: A row, or ``[n]`` rows; not checked against who owns them.
            columns: A position, a slice of them, or ``[n]`` positions.
            values: Slots, of the shape that the index selects.

        Raises:
            IndexError: A row or a column is beyond the table.
        """
        self.table[rows, columns] = values

    def clear(self) -> None:
        """Make every row free; the tables keep their contents."""
        self._rows.clear()
