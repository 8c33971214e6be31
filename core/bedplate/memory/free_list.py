# SPDX-License-Identifier: Apache-2.0
"""FreeList: which of the ids 1…size are free, in O(n) per call and without Python loops.

Pages and request rows are handed out by the same mechanism, so it is written once.  It knows
free or taken and nothing else: sharing is counted by whoever shares (the prefix cache).

The ids lie in one stack array: those before ``head`` are dead entries, those from ``head`` on
are free, in the order in which they will be handed out.  A flag per id says "taken"; there are
always exactly ``head`` flags set, which is what makes the checks of ``free`` cheap.
"""

from __future__ import annotations

__all__ = ["FreeList", "Int32Array", "require_int32"]

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bedplate.errors import ContractError

Int32Array = npt.NDArray[np.int32]

# Named once: numpy looks a scalar type up anew in every call.
_INT32 = np.dtype(np.int32)
_UINT32 = np.dtype(np.uint32)
_INDEX = np.dtype(np.intp)

_RUN_MIN = 512
"""From this many ids on it pays to look whether they are one ascending run."""

_COUNT_RATIO = 16
"""Counting one flag is about this many times cheaper than following one index."""


@dataclass(frozen=True, slots=True)
class FreeListState:
    """The free ids of a list of ``size``, in order; a copy."""

    size: int
    free: Int32Array


class FreeList:
    """Ids 1…size; id 0 is reserved and never handed out.

    Ids that come back are handed out next, in the order in which they were given.

    Args:
        size: How many ids there are; may be 0.
        noun: What an id stands for, for messages.
    """

    __slots__ = ("_head", "_noun", "_order", "_seen", "_stack", "_taken", "size")

    _head: int
    _stack: Int32Array
    _taken: npt.NDArray[np.bool_]

    def __init__(self, size: int, noun: str = "page") -> None:
        self.size = size
        self._noun = noun
        self._order = np.arange(size, dtype=np.int32)
        self._seen = np.zeros(size + 1, dtype=np.int32)
        self.clear()

    def clear(self) -> None:
        """Make every id free, in ascending order."""
        self._restore(np.arange(1, self.size + 1, dtype=np.int32))

    @property
    def num_free(self) -> int:
        """Ids that ``alloc`` could hand out now."""
        return self.size - self._head

    def alloc(self, count: int) -> Int32Array | None:
        """Take ``count`` ids, or ``None`` (and nothing changes) if fewer are free.

        Returns:
            ``[count]`` int32, the caller's own.

        Raises:
            ContractError: ``count`` is negative.
        """
        head = self._head
        end = head + count
        if end > self.size:
            return None
        if count < 0:
            raise ContractError(f"cannot allocate {count} {self._noun}s; ask for 0 or more")
        ids = self._stack[head:end].copy()
        self._head = end
        if count < _RUN_MIN:
            self._taken[ids.astype(_INDEX)] = True
        elif count > self.size - end:
            self._mark_all()  # fewer stay than go
        else:
            self._taken[self._index(ids)] = True
        return ids

    def free(self, ids: Int32Array) -> None:
        """Give ids back; all are checked before anything changes.

        Args:
            ids: ``[n]`` int32, any order.

        Raises:
            ContractError: Some id is out of range, already free, or named twice.
        """
        require_int32(ids, self._noun)
        count = len(ids)
        if count > self._head or not self._release(self._index(ids), count):
            raise self._refusal(ids)
        head = self._head - count
        self._stack[head : self._head] = ids
        self._head = head

    def distinct(self, ids: Int32Array) -> Int32Array:
        """``ids`` with each id once; ids out of range may be refused as by ``free``."""
        index = self._index(ids)
        if isinstance(index, slice):
            return ids
        try:
            if self._are_distinct(index):
                return ids
        except IndexError:
            raise self._refusal(ids) from None
        last_mention: Int32Array = ids[self._seen[index] == self._order[: len(ids)]]
        return last_mention

    def backup(self) -> FreeListState:
        """A copy of the free ids."""
        return FreeListState(self.size, self._stack[self._head :].copy())

    def restore(self, state: object) -> None:
        """Return to a backup of this list.

        Raises:
            ContractError: The backup is of a list of another size.
        """
        if not isinstance(state, FreeListState) or state.size != self.size:
            raise ContractError(
                f"cannot restore {state!r:.80}: it is no backup of a list of "
                f"{self.size} {self._noun}s; pass what backup returned"
            )
        self._restore(state.free)

    def _restore(self, free: Int32Array) -> None:
        self._head = self.size - len(free)
        self._stack = np.zeros(self.size, dtype=np.int32)
        self._stack[self._head :] = free
        self._mark_all()

    def _mark_all(self) -> None:
        """Make the flags agree with the stack."""
        self._taken = np.ones(self.size + 1, dtype=np.bool_)
        self._taken[0] = False
        self._taken[self._stack[self._head :]] = False

    def _index(self, ids: Int32Array) -> slice | npt.NDArray[np.intp]:
        """What to index flags with: a slice if the ids are one run, else machine integers.

        Negative ids become huge, so that numpy refuses them instead of counting from the end.
        """
        count = len(ids)
        if count >= _RUN_MIN:
            first, last = int(ids[0]), int(ids[-1])
            if (
                first > 0
                and last - first == count - 1
                and np.count_nonzero(ids[1:] > ids[:-1]) == count - 1
            ):
                return slice(first, last + 1)
        return ids.view(_UINT32).astype(_INDEX)

    def _release(self, index: slice | npt.NDArray[np.intp], count: int) -> bool:
        """Clear the flags of ``count`` taken, distinct ids; or change nothing, ``False``."""
        taken = self._taken
        if isinstance(index, slice):
            if np.count_nonzero(taken[index]) != count:
                return False
            taken[index] = False
            return True
        try:
            if count * _COUNT_RATIO >= self.size:
                return self._release_many(index, count)
            # Looking into bytes is half the cost of counting flags or comparing arrays.
            if b"\0" in taken[index].tobytes() or not self._are_distinct(index):
                return False
            taken[index] = False
        except IndexError:
            self._mark_all()  # numpy does not promise to look before it writes
            return False
        return True

    def _release_many(self, index: npt.NDArray[np.intp], count: int) -> bool:
        """As ``_release``, by counting all flags: ``count`` of them must have gone out."""
        self._taken[index] = False
        if np.count_nonzero(self._taken) == self._head - count:
            return True
        self._mark_all()
        return False

    def _are_distinct(self, index: npt.NDArray[np.intp]) -> bool:
        """Whether no id is mentioned twice; ``_seen`` then tells each id's last mention."""
        if len(index) > len(self._order):
            self._order = np.arange(len(index), dtype=np.int32)
        order = self._order[: len(index)]
        self._seen[index] = order
        return self._seen[index].tobytes() == order.tobytes()

    def _refusal(self, ids: Int32Array) -> ContractError:
        outside = np.unique(ids[(ids < 1) | (ids > self.size)])
        inside, mentions = np.unique(ids[(ids >= 1) & (ids <= self.size)], return_counts=True)
        twice = inside[mentions > 1]
        idle = inside[~self._taken[inside]]
        faults = [
            f"{words}: {_listing(found)}"
            for words, found in (
                (f"outside 1…{self.size}", outside),
                ("already free", idle),
                ("named twice", twice),
            )
            if len(found)
        ]
        return ContractError(
            f"cannot free {len(ids)} {self._noun}s; {'; '.join(faults)}. "
            f"Nothing was freed; every {self._noun} is freed once, by its last owner",
            outside=outside.tolist(),
            idle=idle.tolist(),
            twice=twice.tolist(),
        )


def require_int32(values: Int32Array, noun: str) -> None:
    """Refuse what is not a vector of int32; a cast would hide an overflow.

    Raises:
        ContractError: Another dtype or number of dimensions.
    """
    if values.dtype != _INT32 or values.ndim != 1:
        raise ContractError(
            f"{noun}s are {values.dtype}, shape {list(values.shape)}; "
            "the host works with one-dimensional int32 arrays"
        )


def _listing(ids: Int32Array, limit: int = 20) -> str:
    shown = ", ".join(map(str, ids[:limit].tolist()))
    return shown if len(ids) <= limit else f"{shown} … ({len(ids)} in all)"
