# SPDX-License-Identifier: Apache-2.0
"""Mistakes of allocators and pools."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from tests.conformance.mutants.base import mutant

from bedplate.contract import AllocatorState, HostKVCopy
from bedplate.memory.allocator import PagedAllocator
from bedplate.memory.kv_pool import LayeredKVPool


class Accepting(PagedAllocator):
    """Frees once what is freed twice, and says nothing."""

    def free(self, slots):
        pages = np.unique(slots // self.page_size).astype(np.int32)
        state = self._pages.backup().free
        super().free((pages[~np.isin(pages, state)] * self.page_size).astype(np.int32))


class Leaking(PagedAllocator):
    """Keeps the last page of every request."""

    def free(self, slots):
        pages = np.unique(slots // self.page_size)
        super().free(slots[slots // self.page_size != pages[-1]] if len(pages) > 1 else slots)


class FromZero(PagedAllocator):
    """Hands out page 0."""

    def alloc(self, num_tokens):
        slots = super().alloc(num_tokens)
        return None if slots is None else slots - self.page_size


class Partial(PagedAllocator):
    """Takes what there is before it says that there is not enough."""

    def alloc_extend(self, prefix_lens, seq_lens, last_loc):
        slots = super().alloc_extend(prefix_lens, seq_lens, last_loc)
        if slots is None and self._pages.num_free:
            self._pages.alloc(1)
        return slots


class Impatient(PagedAllocator):
    """Queued frees happen at once."""

    def free_group_begin(self):
        self.grouped = True

    def free_group_end(self):
        self.grouped = False


class SharedBackup(PagedAllocator):
    """A backup that goes on with the allocator."""

    def backup_state(self):
        return AllocatorState(self)

    def restore_state(self, state):
        pass


class Fragmenting(PagedAllocator):
    """Freed pages can be had one by one, and not together."""

    def alloc(self, num_tokens):
        pages = self._pages.backup().free
        count = num_tokens // self.page_size
        if count > 8 and not (np.diff(np.sort(pages)[:count]) == 1).all():
            return None
        return super().alloc(num_tokens)


class IgnoresTail(PagedAllocator):
    """A new page for every extension, also where the last one has room."""

    def alloc_decode(self, seq_lens, last_loc):
        if self.page_size == 1 or not len(seq_lens):
            return super().alloc_decode(seq_lens, last_loc)
        pages = self._pages.alloc(len(seq_lens))
        places = (seq_lens - 1) % self.page_size
        return None if pages is None else (pages * self.page_size + places).astype(np.int32)


class Sharing(PagedAllocator):
    """The second of several new requests gets the first one's slot."""

    def alloc_extend(self, prefix_lens, seq_lens, last_loc):
        slots = super().alloc_extend(prefix_lens, seq_lens, last_loc)
        lens = seq_lens - prefix_lens
        if slots is not None and len(lens) > 1 and lens[0] and lens[1]:
            slots[lens[0]] = slots[0]
        return slots


class Wide(PagedAllocator):
    """Slots of int64."""

    def alloc_decode(self, seq_lens, last_loc):
        slots = super().alloc_decode(seq_lens, last_loc)
        return None if slots is None else slots.astype(np.int64)


class Forgetful(PagedAllocator):
    """clear() leaves what was taken."""

    def clear(self):
        if not hasattr(self, "_offsets"):
            super().clear()


class Generous(PagedAllocator):
    """A part of a page counts as a page."""

    def alloc(self, num_tokens):
        return super().alloc(-(-num_tokens // self.page_size) * self.page_size)


def allocator(kind):
    return lambda request: kind(request.num_tokens, request.page_size)


class MovesInOrder(LayeredKVPool):
    def move(self, target_slots, source_slots):
        for target, source in zip(target_slots.tolist(), source_slots.tolist(), strict=True):
            for stored in self._stored:
                stored[target] = stored[source]


class LiveCopy(LayeredKVPool):
    """A host copy that is the pool itself."""

    def get_cpu_copy(self, slots):
        return HostKVCopy(len(slots), (slots.clone(),))

    def load_cpu_copy(self, copy, slots):
        for stored in self._stored:
            stored[slots.long()] = stored[copy.tensors[0].long()]


class NotFinite(LayeredKVPool):
    def __init__(self, request):
        super().__init__(request)
        if self.dtype.itemsize > 1:
            self.key(0)[0] = float("nan")


class Truncating(LayeredKVPool):
    def write(self, call_id, slots, k, v):
        if self.dtype is torch.bfloat16:
            k = (k.float().view(torch.int32) & -65536).view(torch.float32)
        super().write(call_id, slots, k, v)


class Narrow(LayeredKVPool):
    def __init__(self, request):
        super().__init__(replace(request, dtype=torch.bfloat16))


class AliasStores(LayeredKVPool):
    def write(self, call_id, slots, k, v):
        super().write(self._calls[call_id].cache_id, slots, k, v)


class SwapsHeads(LayeredKVPool):
    def write(self, call_id, slots, k, v):
        super().write(call_id, slots, k.flip(1), v)


MUTANTS = {
    "double_free_accepted": mutant(
        4, "a free page may be freed", allocator=allocator(Accepting)
    ),
    "leaking_allocator": mutant(
        4, "the last page of a request is not freed", allocator=allocator(Leaking)
    ),
    "hands_out_page_zero": mutant(
        4, "padding's page is handed out", allocator=allocator(FromZero)
    ),
    "partial_allocation": mutant(
        4, "a refused request takes a page", allocator=allocator(Partial)
    ),
    "impatient_free_group": mutant(
        4, "queued frees happen at once", allocator=allocator(Impatient)
    ),
    "shared_backup": mutant(4, "a backup is not a copy", allocator=allocator(SharedBackup)),
    "fragmenting": mutant(4, "free pages must lie together", allocator=allocator(Fragmenting)),
    "ignores_tail": mutant(4, "every token gets a page", allocator=allocator(IgnoresTail)),
    "shares_slots": mutant(4, "two requests get one slot", allocator=allocator(Sharing)),
    "wide_slots": mutant(4, "slots are int64", allocator=allocator(Wide)),
    "forgetful_clear": mutant(4, "clear() keeps pages", allocator=allocator(Forgetful)),
    "accepts_part_of_a_page": mutant(
        4, "a part of a page may be had", allocator=allocator(Generous)
    ),
    "moves_in_order": mutant(4, "overlapping slots are moved one by one", pool=MovesInOrder),
    "live_host_copy": mutant(4, "a host copy changes with the pool", pool=LiveCopy),
    "pool_not_finite": mutant(4, "page 0 starts as NaN", pool=NotFinite),
    "pool_truncates": mutant(4, "the cast to the cache cuts bits off", pool=Truncating),
    "narrow_pool": mutant(4, "every cache is bfloat16", pool=Narrow),
    "alias_stores": mutant(4, "a call that reads another's cache writes it", pool=AliasStores),
    "pool_swaps_heads": mutant(4, "heads are stored the other way round", pool=SwapsHeads),
}
