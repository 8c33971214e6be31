# SPDX-License-Identifier: Apache-2.0
"""WaitingQueue: requests without a row, most urgent first.

A heap by rank; requests that were aborted meanwhile are skipped when they come up.
"""

from __future__ import annotations

__all__ = ["WaitingQueue"]

import heapq
from typing import TYPE_CHECKING

from bedplate.scheduling.request import RequestState

if TYPE_CHECKING:
    from bedplate.scheduling.request import Request


class WaitingQueue:
    """Requests in state ``WAITING``; the others in the heap are dead."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Request]] = []
        self._dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._dead

    def push(self, request: Request) -> None:
        """Queue a request; one that had to give way returns to its old place."""
        request.state = RequestState.WAITING
        heapq.heappush(self._heap, (request.rank, request))

    def peek(self) -> Request | None:
        """The most urgent request."""
        while self._heap and self._heap[0][1].state is not RequestState.WAITING:
            heapq.heappop(self._heap)
            self._dead -= 1
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Request:
        """Remove and return what ``peek`` returned."""
        return heapq.heappop(self._heap)[1]

    def forget(self) -> None:
        """One of the queued requests was finished by its caller."""
        self._dead += 1
