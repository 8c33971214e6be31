# SPDX-License-Identifier: Apache-2.0
"""Scheduler: decides what the next pass computes, and takes in what it produced.

``next_batch`` plans a pass; ``apply`` or ``fail`` settles the oldest one in flight.  Between
the two the next pass may be planned already (overlap): sampled tokens are then still on the
device, and what ends a request is learnt one pass late.

Extend passes go first, within a token budget; else everything decodes.  If no slot is free,
cached prefixes are evicted, then the request that ranks last gives way: it returns to the
queue with its tokens and computes them again later.  Nobody gives way while a pass is in
flight: ``next_batch`` returns ``None`` then, and is asked again once that pass is settled.

Called by ``engine.core``, from one thread at a time.
"""

from __future__ import annotations

__all__ = ["Scheduler"]

from collections import deque
from typing import TYPE_CHECKING

from bedplate.batch.forward_mode import ForwardMode
from bedplate.errors import ConfigError, RequestTooLongError
from bedplate.scheduling.assembly import extend_batch, planned_extend
from bedplate.scheduling.planned import Applied, Chunk, PlannedStep
from bedplate.scheduling.policy import chunk_end
from bedplate.scheduling.request import RequestState
from bedplate.scheduling.roster import Roster
from bedplate.scheduling.settling import apply_output, fail_step
from bedplate.scheduling.slot_source import SlotSource

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bedplate.batch.schedule_batch import ScheduleBatch
    from bedplate.batch.step import StepOutput
    from bedplate.contract.memory import TokenToKVPoolAllocator
    from bedplate.scheduling.request import FinishReason, Request
    from bedplate.scheduling.roster import RowPool


class Scheduler:
    """See the module.

    Args:
        allocator: Slots; all of them are free and the scheduler's.
        req_to_token_pool: Rows; likewise.
        page_size: Tokens a page.
        max_context_len: Longest request, new tokens included.
        max_running_requests: Requests that may own rows at once.
        max_prefill_tokens: New tokens of one extend pass.
        mixed: Decode rows ride along in extend passes.
        prefix_cache: Keep computed prefixes for later requests.
        overlap: Passes are planned before the tokens of the previous one are known.

    Attributes:
        admitted: Requests that got a row in the pass planned last.
        roster: Where every request stands.
        slots: Where slots come from.

    Raises:
        ConfigError: The token budget holds not even one page.
    """

    def __init__(
        self,
        *,
        allocator: TokenToKVPoolAllocator,
        req_to_token_pool: RowPool,
        page_size: int,
        max_context_len: int,
        max_running_requests: int,
        max_prefill_tokens: int,
        mixed: bool = False,
        prefix_cache: bool = True,
        overlap: bool = False,
    ) -> None:
        if max_prefill_tokens < page_size:
            raise ConfigError(
                f"max_prefill_tokens is {max_prefill_tokens}, less than one page of "
                f"{page_size} tokens; long prompts are cut at pages, so give at least that"
            )
        self._page = page_size
        self._max_context_len = max_context_len
        self._budget = max_prefill_tokens
        self._mixed = mixed
        self.overlap = overlap
        self.slots = SlotSource(allocator, page_size, prefix_cache=prefix_cache)
        self.roster = Roster(
            req_to_token_pool, self.slots, page_size, max_running_requests, overlap=overlap
        )
        self._in_flight: deque[PlannedStep] = deque()
        self._must_settle = False
        self.admitted: list[Request] = []

    @property
    def has_requests(self) -> bool:
        """Whether any request was added and has not ended."""
        return bool(self.roster.waiting) or self.roster.num_running > 0

    @property
    def num_waiting(self) -> int:
        """Requests without a row."""
        return len(self.roster.waiting)

    @property
    def num_in_flight(self) -> int:
        """Passes planned and not settled."""
        return len(self._in_flight)

    @property
    def free_tokens(self) -> int:
        """Slots that are free or can be made so without harming a request."""
        return self.slots.free_size()

    def limit_of(self, prompt_len: int, max_tokens: int | None) -> int:
        """Length at which a request must end.

        Raises:
            RequestTooLongError: Prompt and new tokens cannot fit, even alone; the numbers are
                attributes.
        """
        # The last token is never computed, so it needs no slot.
        room = min(self._max_context_len, self.slots.capacity + 1)
        wanted = prompt_len + (1 if max_tokens is None else max_tokens)
        if wanted <= room:
            return room if max_tokens is None else wanted
        new = "at least 1 new token" if max_tokens is None else f"max_tokens {max_tokens}"
        raise RequestTooLongError(
            f"A prompt of {prompt_len} tokens and {new} make {wanted}, but a request can have "
            f"{room}: the context holds {self._max_context_len} and the key-value pool "
            f"{self.slots.capacity} tokens. Shorten the prompt, lower max_tokens, or raise "
            "max_context_len, max_total_tokens or mem_fraction",
            prompt_len=prompt_len,
            max_tokens=max_tokens,
            max_context_len=self._max_context_len,
            pool_tokens=self.slots.capacity,
        )

    def add(self, request: Request) -> None:
        """Queue a request whose ``max_len`` came from ``limit_of``."""
        self.roster.queue(request)

    def finish(
        self,
        request: Request,
        reason: FinishReason,
        stop_reason: int | str | None = None,
        error: str = "",
    ) -> None:
        """End a request now, wherever it stands, and free what it owns.

        Tokens of passes in flight are dropped when they arrive.  A finished one is left alone.
        """
        self.roster.finish(request, reason, stop_reason, error)

    def next_batch(self) -> ScheduleBatch | None:
        """Plan a pass.

        Returns:
            The pass, whose arrays are valid until the next call; ``None`` if there is nothing
            to do, or nothing before a pass in flight is settled.
        """
        self.admitted.clear()
        self._must_settle = False
        roster = self.roster
        roster.regroup()
        chunks: list[Chunk] = []
        riders = self._count_riders()
        if roster.extending or (roster.waiting and not roster.blocked):
            chunks = self._plan_chunks(self._budget - riders)
        if chunks:
            # Those who were to ride may have given way meanwhile.
            ride = riders > 0 and roster.decode.size > 0 and self._advance()
            return self._plan_extend(chunks, ride=ride)
        return None if self._must_settle else self._plan_decode()

    def apply(self, output: StepOutput) -> Applied:
        """Take in the tokens of the oldest pass in flight and end what has ended."""
        return apply_output(self.roster, self._in_flight.popleft(), output)

    def fail(self, error: str) -> Applied:
        """The oldest pass in flight raised: its requests end, the others are unharmed."""
        return fail_step(self.roster, self._in_flight.popleft(), error)

    def _count_riders(self) -> int:
        """Decode rows that could share an extend pass and leave a page of its budget."""
        size = self.roster.decode.size
        return size if self._mixed and size + self._page <= self._budget else 0

    def _plan_chunks(self, budget: int) -> list[Chunk]:
        """New prompt tokens for one pass, most urgent first.

        Nobody gets slots that a more urgent request could not get: unfinished prompts would
        hold each other up.
        """
        chunks: list[Chunk] = []
        begun = deque(sorted(self.roster.extending, key=lambda r: r.rank))
        while budget > 0 and (request := self._next_to_extend(begun, chunks)) is not None:
            taken = self._plan_chunk(request, budget, chunks)
            if not taken:
                break
            budget -= taken
        return chunks

    def _next_to_extend(self, begun: deque[Request], chunks: list[Chunk]) -> Request | None:
        """The most urgent of those that have begun and, if it gets a row, the first to wait."""
        roster = self.roster
        waiting = None if roster.blocked else roster.waiting.peek()
        if waiting is not None and not (begun and begun[0].rank < waiting.rank):
            if self._admit(waiting, chunks):
                return waiting
            if self._must_settle:
                return None
        while begun:
            request = begun.popleft()
            if request.state is RequestState.EXTENDING:  # else it has just given way
                return request
        return None

    def _plan_chunk(self, request: Request, budget: int, chunks: list[Chunk]) -> int:
        """Plan the next chunk of a request; returns its new tokens, 0 if there is no room."""
        table, row = self.roster.table, request.row
        start, total = int(table.seq_len[row]), int(table.known_len[row])
        end = chunk_end(start, total, budget, self._page)
        if end == start:
            return 0
        last_slot = int(table.slots_of(row, start - 1, start)[0]) if start else -1
        slots = self.slots.extend(start, end, last_slot)
        if slots is None:
            return 0
        table.extend(row, slots)
        chunk = Chunk(
            request=request,
            row=row,
            start=start,
            end=end,
            slots=slots,
            score_from=_score_from(request, start, end),
            last=end == total,
        )
        chunks.append(chunk)
        if chunk.last:
            self.roster.expect_token(request, end)
        return end - start

    def _admit(self, request: Request, chunks: list[Chunk]) -> bool:
        """Give a waiting request a row; those of lower priority give way if they must."""
        roster = self.roster
        while not roster.admit(request):
            victim = self._victim_for(request, chunks)
            if victim is None:
                roster.blocked = True
                return False
            if self._in_flight:
                self._must_settle = True
                return False
            roster.preempt(victim)
        self.admitted.append(request)
        return True

    def _victim_for(self, request: Request, chunks: list[Chunk]) -> Request | None:
        planned = {chunk.row for chunk in chunks}
        others = [r for r in self.roster.preemptible() if r.row not in planned]
        last = max(others, key=lambda r: r.rank, default=None)
        return last if last is not None and last.priority < request.priority else None

    def _plan_extend(self, chunks: list[Chunk], *, ride: bool) -> ScheduleBatch:
        table, decode = self.roster.table, self.roster.decode
        riders = decode if ride else None
        batch = extend_batch(chunks, table, riders, overlap=self.overlap)
        self._in_flight.append(planned_extend(batch, chunks, table))
        if ride:
            self._expect_last()
        return batch

    def _plan_decode(self) -> ScheduleBatch | None:
        decode = self.roster.decode
        while decode.size and not self._advance():
            if self._in_flight:
                return None
            self.roster.preempt(max(self.roster.preemptible(), key=lambda r: r.rank))
        if not decode.size:
            return None
        self._in_flight.append(
            PlannedStep(
                mode=ForwardMode.DECODE,
                rows=decode.row_index,
                serials=decode.serials,
                known=decode.seq_lens + 1,
                flat=decode.flat + 1,
                numbers=decode.numbers,
                epoch=decode.epoch,
                ending=self._expect_last(),
                num_tokens=decode.size,
            )
        )
        return decode.batch

    def _advance(self) -> bool:
        """Give every member of the decode batch a slot; ``False`` = no room, no change."""
        decode = self.roster.decode
        decode.refresh()
        decode.seq_lens += 1
        if decode.steps_in_page > 0:  # everybody goes on in a page that is theirs
            decode.advance(decode.slots + 1)
            return True
        slots = self.slots.decode(decode.seq_lens, decode.slots)
        if slots is None:
            decode.seq_lens -= 1
            return False
        decode.advance(slots)
        return True

    def _expect_last(self) -> npt.NDArray[np.int64] | None:
        """Members for which the pass just planned is the last one."""
        decode = self.roster.decode
        ends = decode.ending()
        if ends is not None:
            self.roster.expect_last(decode.row_index[ends])
        return ends


def _score_from(request: Request, start: int, end: int) -> int:
    """First of the new tokens whose prediction is a wanted prompt logprob; −1 for none."""
    last = request.prompt_len - 1
    if request.params.prompt_logprobs is None or request.scored >= min(end, last):
        return -1
    first = max(request.scored - start, 0)
    request.scored = min(end, last)
    return first
