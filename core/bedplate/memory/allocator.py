# SPDX-License-Identifier: Apache-2.0
"""PagedAllocator: slots for new tokens, in whole pages, on the host.

The core's default behind ``TokenToKVPoolAllocator``; a page of one token is the plain token
allocator.  The scheduler asks for slots, the prefix cache and the scheduler free pages.
Nothing here loops over requests or tokens in Python, and nothing waits for a device.

Shapes: B requests, T new tokens, S page size; slot = page · S + offset, page 0 is padding's.
"""

from __future__ import annotations

__all__ = ["PagedAllocator"]

from typing import NamedTuple

import numpy as np

from bedplate.contract.memory import AllocatorState, TokenToKVPoolAllocator
from bedplate.errors import ContractError
from bedplate.memory.free_list import FreeList, Int32Array, require_int32

_MAX_SLOTS = 2**31

# Array operands: numpy takes twice as long to turn a Python number into one in every call.
_ZERO = np.array(0, dtype=np.int32)
_ONE = np.array(1, dtype=np.int32)


class PagedAllocator(TokenToKVPoolAllocator):
    """Pages 1…num_tokens/page_size; those freed last are handed out first.

    A page is free or taken: who shares pages counts its own references, and frees a page when
    the last one goes.

    Args:
        num_tokens: Usable tokens, a multiple of ``page_size``.
        page_size: Tokens a page.

    Raises:
        ContractError: The sizes do not fit together, or slots would not fit into int32.
    """

    def __init__(self, num_tokens: int, page_size: int = 1) -> None:
        if page_size < 1 or num_tokens < 0 or num_tokens % page_size:
            raise ContractError(
                f"an allocator of {num_tokens} tokens in pages of {page_size}: the page size "
                "must be at least 1 and divide the number of tokens"
            )
        if num_tokens + page_size > _MAX_SLOTS:
            raise ContractError(
                f"{num_tokens} tokens and a page of {page_size} for padding need slots beyond "
                f"int32; ask for at most {_MAX_SLOTS} slots"
            )
        self.page_size = page_size
        self.num_tokens = num_tokens
        self._pages = FreeList(num_tokens // page_size)
        self._page_size = np.array(page_size, dtype=np.int32)
        self._offsets = np.arange(page_size, dtype=np.int32)
        self._group: list[Int32Array] | None = None

    # Pages: the fast primitives.

    def available_pages(self) -> int:
        """Pages that could be allocated now."""
        return self._pages.num_free

    def alloc_pages(self, count: int) -> Int32Array | None:
        """``[count]`` int32 page numbers, the caller's own; ``None`` if fewer are free."""
        return self._pages.alloc(count)

    def free_pages(self, pages: Int32Array) -> None:
        """Free pages at once, also inside a free group; checked before anything changes.

        Args:
            pages: ``[n]`` int32 page numbers, each once.

        Raises:
            ContractError: A page is out of range, already free, or named twice; all are
                listed and none was freed.
        """
        self._pages.free(pages)

    # Slots: the contract.

    def available_size(self) -> int:
        """Tokens that could be allocated now; queued frees do not count."""
        return self._pages.num_free * self.page_size

    def alloc(self, num_tokens: int) -> Int32Array | None:
        """``[num_tokens]`` slots of whole pages, page after page; ``None`` if too few.

        Raises:
            ContractError: ``num_tokens`` is negative or no multiple of the page size.
        """
        count, rest = divmod(num_tokens, self.page_size)
        if rest:
            raise ContractError(
                f"cannot allocate {num_tokens} tokens in pages of {self.page_size}; round up "
                f"to {(count + 1) * self.page_size}, or use alloc_extend"
            )
        pages = self._pages.alloc(count)
        return None if pages is None else self._slots(pages)

    def alloc_extend(
        self, prefix_lens: Int32Array, seq_lens: Int32Array, last_loc: Int32Array
    ) -> Int32Array | None:
        """Slots for tokens ``prefix_lens[i] … seq_lens[i]``: first the rest of the last page.

        Args:
            prefix_lens: ``[B]`` int32 tokens that already have slots.
            seq_lens: ``[B]`` int32 length afterwards, not below ``prefix_lens``.
            last_loc: ``[B]`` int32 slot of the last prefix token; −1 for an empty prefix.
                Ignored for pages of one token.

        Returns:
            ``[T]`` int32, request after request; ``None`` if the pages do not suffice.

        Raises:
            ContractError: Lengths shrink, or a last slot contradicts its prefix.
        """
        lens = seq_lens - prefix_lens
        self._check_extend(prefix_lens, lens, last_loc)
        if self.page_size == 1:
            return self._pages.alloc(int(lens.sum()))
        plan = _plan_extend(prefix_lens, seq_lens, self._page_size)
        pages = self._pages.alloc(plan.num_new)
        if pages is None:
            return None
        touched = np.empty(len(plan.is_new), dtype=np.int32)
        touched[plan.is_new] = pages
        touched[~plan.is_new] = last_loc[plan.has_tail] // self._page_size
        places = np.arange(int(lens.sum())) + np.repeat(plan.shift, lens)
        slots: Int32Array = self._slots(touched)[places]
        return slots

    def alloc_decode(self, seq_lens: Int32Array, last_loc: Int32Array) -> Int32Array | None:
        """One slot per request: the one after its last, or the first of a new page.

        Args:
            seq_lens: ``[B]`` int32 length with the new token, at least 1.
            last_loc: ``[B]`` int32 slot of the token before; −1 if there is none.
                Ignored for pages of one token.

        Returns:
            ``[B]`` int32; ``None`` if the pages do not suffice.

        Raises:
            ContractError: A length is below 1, or a last slot contradicts it.
        """
        if self.page_size == 1:
            return self._pages.alloc(len(seq_lens))
        prefix_lens = seq_lens - _ONE
        offsets = prefix_lens % self._page_size
        slots = last_loc + _ONE
        self._check_last(prefix_lens, slots - offsets, last_loc)
        is_new = offsets == _ZERO
        pages = self._pages.alloc(int(np.count_nonzero(is_new)))
        if pages is None:
            return None
        slots[is_new] = pages * self._page_size
        return slots

    def free(self, slots: Int32Array) -> None:
        """Return the pages of ``slots``; all are checked before anything changes.

        A page is freed when *any* of its slots is: free whole pages.  Naming a page by
        several of its slots is one mention of it; in pages of one token, a slot named twice
        is an error.

        Args:
            slots: ``[n]`` int32, any order.

        Raises:
            ContractError: A page is out of range or already free; all are listed.
        """
        if self._group is not None:
            require_int32(slots, "slot")
            self._group.append(slots.copy())
        elif self.page_size == 1:
            self._pages.free(slots)
        else:
            require_int32(slots, "slot")
            self._pages.free(self._pages.distinct(_without_repeats(slots // self._page_size)))

    def free_group_begin(self) -> None:
        """Queue the frees that follow; groups do not nest.

        Raises:
            ContractError: A group is open.
        """
        self._require_no_group("begin a free group")
        self._group = []

    def free_group_end(self) -> None:
        """Free what was queued, as one call of ``free``.

        Raises:
            ContractError: No group is open, or ``free`` refuses; the group is closed then
                and nothing of it was freed.
        """
        if self._group is None:
            raise ContractError("cannot end a free group: none is open; begin one first")
        queued, self._group = self._group, None
        if queued:
            self.free(np.concatenate(queued))

    def backup_state(self) -> AllocatorState:
        """A copy of the free list; refused while a group is open."""
        self._require_no_group("back up")
        return AllocatorState(self._pages.backup())

    def restore_state(self, state: AllocatorState) -> None:
        """Return to a backup of this allocator; it can be used again.

        Raises:
            ContractError: A group is open, or the backup is of another allocator's size.
        """
        self._require_no_group("restore")
        self._pages.restore(state.data)

    def clear(self) -> None:
        """Make everything free, in ascending order, and close an open group."""
        self._group = None
        self._pages.clear()

    def _slots(self, pages: Int32Array) -> Int32Array:
        if self.page_size == 1:
            return pages
        return (pages[:, None] * self._page_size + self._offsets).ravel()

    def _require_no_group(self, act: str) -> None:
        if self._group is not None:
            raise ContractError(f"cannot {act}: a free group is open; end it first")

    def _check_extend(
        self, prefix_lens: Int32Array, lens: Int32Array, last_loc: Int32Array
    ) -> None:
        shrinking = np.count_nonzero(lens < _ZERO)
        if shrinking:
            raise ContractError(
                f"{shrinking} of {len(lens)} requests would shrink: seq_lens must not be "
                f"below prefix_lens, but differ by {lens.tolist()}"
            )
        if self.page_size > 1:
            starts = last_loc + _ONE - prefix_lens % self._page_size
            self._check_last(prefix_lens, starts, last_loc)

    def _check_last(
        self, prefix_lens: Int32Array, starts: Int32Array, last_loc: Int32Array
    ) -> None:
        """The next slots must continue the prefixes, and not on the page of padding.

        ``starts`` is where their pages start, if they do.
        """
        misfits = starts % self._page_size
        strays = ((starts > _ZERO) != (prefix_lens > _ZERO)) | (prefix_lens < _ZERO)
        if np.count_nonzero(misfits) or np.count_nonzero(strays):
            wrong = np.flatnonzero(misfits | strays)
            raise ContractError(
                f"requests {wrong.tolist()}: last slots {last_loc[wrong].tolist()} cannot end "
                f"prefixes of {prefix_lens[wrong].tolist()} tokens in pages of "
                f"{self.page_size}; (last + 1) % page must equal prefix % page, and an empty "
                "prefix has −1"
            )


class _ExtendPlan(NamedTuple):
    """Where the tokens of an extension go, if every touched page is laid end to end.

    The touched pages of a request are its unfinished last page, if any, and its new pages.
    """

    num_new: int
    has_tail: np.ndarray[tuple[int], np.dtype[np.bool_]]  # [B] has an unfinished last page
    is_new: np.ndarray[tuple[int], np.dtype[np.bool_]]  # [touched] is not such a page
    shift: np.ndarray[tuple[int], np.dtype[np.int64]]  # [B] packed token → place


def _plan_extend(
    prefix_lens: Int32Array, seq_lens: Int32Array, page_size: Int32Array
) -> _ExtendPlan:
    offsets = prefix_lens % page_size
    has_tail = offsets > _ZERO
    num_touched = -(-seq_lens // page_size) - prefix_lens // page_size
    first_touched = np.cumsum(num_touched) - num_touched
    is_new = np.ones(int(num_touched.sum()), dtype=np.bool_)
    is_new[first_touched[has_tail]] = False
    lens = seq_lens - prefix_lens
    first_token = np.cumsum(lens) - lens
    shift = first_touched * page_size + offsets - first_token
    return _ExtendPlan(int(np.count_nonzero(is_new)), has_tail, is_new, shift)


def _without_repeats(pages: Int32Array) -> Int32Array:
    """Drop pages equal to the one before: tokens of a page mostly come side by side."""
    keep = np.ones(len(pages), dtype=np.bool_)
    np.not_equal(pages[1:], pages[:-1], out=keep[1:])
    return pages[keep]
