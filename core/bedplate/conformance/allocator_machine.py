# SPDX-License-Identifier: Apache-2.0
"""A state machine that no slot allocator may confuse: requests grow, share, go and come back.

The model is a list of slots per request.  After every step nothing is lost and nothing is
shared, seen through the contract alone: what is handed out, what is refused, what is free.
"""

from __future__ import annotations

__all__ = ["AllocatorMachine", "ints", "run_machine"]

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bedplate.conformance.check import Wrong, require
from bedplate.contract.memory import AllocatorRequest, TokenToKVPoolAllocator
from bedplate.errors import ContractError

if TYPE_CHECKING:
    import numpy.typing as npt

    Int32Array = npt.NDArray[np.int32]

Make = Callable[[AllocatorRequest], TokenToKVPoolAllocator]
_TYPED = (ContractError, ValueError, IndexError)
"""What a refused call may raise; ours is the first."""


def ints(*values: int) -> Int32Array:
    """``[n]`` int32."""
    return np.array(values, dtype=np.int32)


def run_machine(make: Make, page_sizes: tuple[int, ...], *, examples: int, steps: int) -> None:
    """Let the machine try to confuse what ``make`` makes; the same way every time.

    The first confusion ends it: looking for a shorter one takes minutes.

    Raises:
        Wrong: It succeeded.
    """
    machine = type("Machine", (AllocatorMachine,), {"make": staticmethod(make),
                                                     "page_sizes": page_sizes})  # fmt: skip
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, database=None,
            derandomize=True, print_blob=False, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


class AllocatorMachine(RuleBasedStateMachine):
    """See the module.

    Attributes:
        make: Makes the allocator.
        page_sizes: Those to try.
    """

    make: ClassVar[Make]
    page_sizes: ClassVar[tuple[int, ...]] = (1,)

    @initialize(data=st.data(), num_pages=st.sampled_from([1, 3, 40, 200]))
    def start(self, data: Any, num_pages: int) -> None:
        """An allocator of a size."""
        self.page_size: int = data.draw(st.sampled_from(self.page_sizes))
        self.num_pages = num_pages
        request = AllocatorRequest(
            num_tokens=num_pages * self.page_size, page_size=self.page_size
        )
        self.allocator = type(self).make(request)
        self.requests: list[list[int]] = []
        self.saved: tuple[Any, list[list[int]]] | None = None

    @property
    def taken(self) -> list[int]:
        """Pages in use."""
        return [page for slots in self.requests for page in self.pages(slots)]

    @rule(lens=st.lists(st.integers(0, 70), max_size=5))
    def begin(self, lens: list[int]) -> None:
        """New requests, all at once."""
        prefixes = ints(*[0] * len(lens))
        slots = self.allocator.alloc_extend(prefixes, ints(*lens), prefixes - 1)
        got = self.granted(slots, sum(-(-n // self.page_size) for n in lens))
        if got is not None:
            parts = np.split(got, np.cumsum(lens)[:-1]) if lens else []
            self.requests += [part.tolist() for part in parts if len(part)]

    @rule(pages=st.integers(0, 6))
    def take_pages(self, pages: int) -> None:
        """Whole pages."""
        got = self.granted(self.allocator.alloc(pages * self.page_size), pages)
        if got is not None and pages:
            self.requests.append(got.tolist())

    @precondition(lambda self: self.requests)
    @rule(new=st.integers(0, 40))
    def extend(self, new: int) -> None:
        """Every request grows."""
        prefixes = ints(*map(len, self.requests))
        lasts = ints(*(slots[-1] for slots in self.requests))
        need = sum(self._count(len(s) + new) - self._count(len(s)) for s in self.requests)
        slots = self.allocator.alloc_extend(prefixes, prefixes + np.int32(new), lasts)
        got = self.granted(slots, need)
        if got is not None:
            for row, part in enumerate(np.split(got, len(self.requests))):
                self.requests[row] += part.tolist()

    @precondition(lambda self: self.requests)
    @rule()
    def decode(self) -> None:
        """Every request gets one token more."""
        lens = ints(*(len(slots) + 1 for slots in self.requests))
        lasts = ints(*(slots[-1] for slots in self.requests))
        need = sum(len(slots) % self.page_size == 0 for slots in self.requests)
        slots = self.allocator.alloc_decode(lens, lasts)
        got = self.granted(slots, need)
        if got is not None:
            for owned, slot in zip(self.requests, got.tolist(), strict=True):
                owned.append(slot)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), grouped=st.booleans())
    def free(self, data: Any, grouped: bool) -> None:
        """Some requests end; their frees may be queued."""
        rows = data.draw(st.sets(st.integers(0, len(self.requests) - 1)))
        gone = [self.requests[row] for row in sorted(rows)]
        self.requests = [s for row, s in enumerate(self.requests) if row not in rows]
        before = self.allocator.available_size()
        if grouped:
            self.allocator.free_group_begin()
        for slots in gone:
            self.allocator.free(ints(*data.draw(st.permutations(slots))))
        if grouped:
            require(self.allocator.available_size() == before, "a queued free frees at once")
            self.allocator.free_group_end()

    @rule(data=st.data())
    def free_wrongly(self, data: Any) -> None:
        """What is not taken cannot be freed, and trying changes nothing."""
        idle = set(range(1, self.num_pages + 1)) - set(self.taken)
        page = data.draw(st.sampled_from(sorted({0, self.num_pages + 1, *idle})))
        before = self.allocator.available_size()
        try:
            self.allocator.free(ints(page * self.page_size))
        except _TYPED:
            require(
                self.allocator.available_size() == before, "a refused free frees all the same"
            )
            return
        what = "a free page" if page in idle else "a page that does not exist"
        raise Wrong(f"frees {what} without an error")

    @rule()
    def back_up(self) -> None:
        """Note the state."""
        self.saved = (self.allocator.backup_state(), [list(s) for s in self.requests])

    @precondition(lambda self: self.saved)
    @rule()
    def restore(self) -> None:
        """Return to the state that was noted; it may be used again."""
        assert self.saved is not None
        state, requests = self.saved
        self.allocator.restore_state(state)
        self.requests = [list(slots) for slots in requests]

    @rule()
    def clear(self) -> None:
        """Everything is free again."""
        self.allocator.clear()
        self.requests, self.saved = [], None

    @invariant()
    def nothing_is_lost(self) -> None:
        """Free and taken pages are all pages, and what is free can be had."""
        free = self.num_pages - len(self.taken)
        size = self.allocator.available_size()
        require(size == free * self.page_size, f"{size} tokens are free of "
                f"{free * self.page_size}: pages are lost or counted twice")  # fmt: skip
        state = self.allocator.backup_state()
        rest = self.allocator.alloc(size)
        require(rest is not None, f"{size} tokens are said to be free, and cannot be had")
        assert rest is not None
        pages = [int(p) for p in np.unique(rest // self.page_size)]
        self.allocator.restore_state(state)
        require(sorted(pages + self.taken) == list(range(1, self.num_pages + 1)),
                "free and taken pages are not all pages once")  # fmt: skip

    @invariant()
    def tokens_of_a_page_lie_side_by_side(self) -> None:
        """A slot is its page's start and the token's place in it."""
        for slots in self.requests:
            for position, slot in enumerate(slots):
                require(
                    slot % self.page_size == position % self.page_size,
                    "a token lies at another place of its page than its position",
                )

    def granted(self, slots: Int32Array | None, pages: int) -> Int32Array | None:
        """The slots, once it is clear that granting or refusing them was right."""
        free = self.num_pages - len(self.taken)
        if slots is None:
            require(pages > free, f"refuses {pages} pages while {free} are free")
            require(self.allocator.available_size() == free * self.page_size,
                    "a refused request takes pages all the same")  # fmt: skip
            return None
        require(pages <= free, f"hands out {pages} pages while {free} are free")
        require(slots.dtype == np.int32, f"slots are {slots.dtype}, not int32")
        return slots

    def pages(self, slots: list[int]) -> set[int]:
        """Pages that the slots lie in."""
        return {slot // self.page_size for slot in slots}

    def _count(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
