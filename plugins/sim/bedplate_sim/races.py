# SPDX-License-Identifier: Apache-2.0
"""Who may touch memory when: a clock for each stream and one for the host.

A clock says how far its owner knows each stream to have come.  Waiting for an event merges the
event's clock.  Memory remembers who wrote and read it last; whoever touches it without knowing
of them has forgotten to wait, whether or not the schedule of this run made it visible.
"""

from __future__ import annotations

__all__ = ["Access", "Clock", "RaceError", "check", "merge", "note"]

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bedplate.errors import ContractError

if TYPE_CHECKING:
    from bedplate_sim.allocator import Block

Clock = dict[int, int]
"""Stream → how many pieces of its work are known to be done."""


class RaceError(ContractError):
    """Memory was touched before the work that uses it is known to be done."""


@dataclass(frozen=True, slots=True)
class Access:
    """One piece of work that touched a block."""

    stream: int
    number: int
    name: str


def merge(clock: Clock, other: Clock) -> None:
    """Know what the other knows, too."""
    for stream, number in other.items():
        if clock.get(stream, 0) < number:
            clock[stream] = number


def check(block: Block, clock: Clock, name: str, *, write: bool) -> None:
    """Whether the owner of ``clock`` may read or write now.

    Raises:
        RaceError: Earlier work on the block is not known to be done.
    """
    earlier = [block.writer, *(block.readers.values() if write else ())]
    for access in earlier:
        if access is not None and clock.get(access.stream, 0) < access.number:
            did = "writes" if access is block.writer else "reads"
            raise RaceError(
                f"{name} {'overwrites' if write else 'reads'} memory at {block.address:#x} "
                f"that {access.name} (stream {access.stream}) still {did}. Wait for an event "
                "recorded after it, or synchronize"
            )


def note(block: Block, access: Access, *, write: bool) -> None:
    """Remember the access."""
    if write:
        block.writer = access
        block.readers.clear()
    else:
        block.readers[access.stream] = access
