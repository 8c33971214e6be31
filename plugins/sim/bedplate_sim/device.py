# SPDX-License-Identifier: Apache-2.0
"""One simulated device: streams of queued work, events, memory, and what can go wrong.

Work is *launched*: it joins the current stream, or the tape of the graph that the calling
thread captures.  A schedule runs it.  The host learns of results only by waiting.
"""

from __future__ import annotations

__all__ = ["Device", "DeviceLostError", "Event", "Stream", "Task"]

import threading
import time
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from bedplate.errors import BackendError, CaptureError
from bedplate_sim.allocator import Allocation, Allocator, Block, Pool, poison
from bedplate_sim.options import FAULTS
from bedplate_sim.races import Access, Clock, RaceError, check, merge, note
from bedplate_sim.schedules import make_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bedplate_sim.options import Options


class DeviceLostError(BackendError):
    """Queued work failed, or the device was made to fail; nothing runs on it any more."""


@dataclass(eq=False, slots=True)
class Task:
    """One piece of work.

    Attributes:
        name: Of the operation.
        run: Does it, on the host memory behind the device's.
        reads: Blocks that it reads.
        writes: Blocks that it writes.
        after: (stream, number) that must be done before.
    """

    name: str
    run: Callable[[], object]
    reads: Sequence[Block] = ()
    writes: Sequence[Block] = ()
    after: Sequence[tuple[Stream, int]] = ()


class Tape(Protocol):
    """Where work goes while a graph is captured; ``graph.Tape``."""

    pool: Pool

    def record(self, task: Task) -> None:
        """Keep the work for replays."""


@dataclass(eq=False, slots=True)
class Stream:
    """A queue whose work runs in order.

    Attributes:
        number: Which of the device's.
        pool: Cache of memory that was allocated while the stream was current.
        tasks: What has not run.
        launched: Pieces of work so far.
        done: Those that have run.
        clock: What its next piece of work knows to be done.
        after: Events that its next piece of work waits for.
    """

    number: int
    pool: Pool
    tasks: deque[Task] = field(default_factory=deque)
    launched: int = 0
    done: int = 0
    clock: Clock = field(default_factory=dict)
    after: list[tuple[Stream, int]] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether its next piece of work could run."""
        return bool(self.tasks) and all(s.done >= n for s, n in self.tasks[0].after)

    def wait(self, event: Event) -> None:
        """Let whatever is queued from now on wait for the event."""
        self.after.append((event.stream, event.number))
        merge(self.clock, event.clock)


class Event:
    """A point in a stream; what ``DeviceRuntime.record_event`` gives."""

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device = device
        self.stream, self.number, self.clock = stream, stream.launched, dict(stream.clock)
        self._due = time.monotonic() + device.options.event_delay_ms / 1000

    def synchronize(self) -> None:
        """Block the host until the point is reached."""
        self._device.finish(self, "Event.synchronize")
        time.sleep(max(0.0, self._due - time.monotonic()))

    def query(self) -> bool:
        """Whether it is; a device that runs only what is waited for comes a little nearer."""
        device = self._device
        with device.lock:
            device.schedule.poll(self.stream)
            if self.stream.done < self.number or time.monotonic() < self._due:
                return False
            merge(device.host_clock, self.clock)
        return True


class Device:
    """See the module.

    Args:
        torch_device: What its tensors say of themselves.
        options: What it is asked to be.

    Attributes:
        streams: All of them; the first is current unless another is chosen.
        host_clock: What the host knows to be done.
        waits: What the host waited with → how often.
        holders: Engines that have it → whether their start-up is over.
    """

    def __init__(self, torch_device: torch.device, options: Options) -> None:
        self.torch_device, self.options = torch_device, options
        self.allocator = Allocator(options.memory)
        self.lock = threading.RLock()
        self.schedule = make_schedule(options.schedule, self, options.seed)
        self.host_clock: Clock = {}
        self.waits: Counter[str] = Counter()
        self.holders: dict[object, bool] = {}
        self.streams: list[Stream] = []
        self._local = threading.local()
        self._pinned: dict[int, Block] = {}
        self._numbers = count()
        self._lost: BaseException | None = None
        self._faults: dict[str, int] = {}
        for what in FAULTS:
            self.fail(what, getattr(options, f"fail_{what}"))
        self.home = self.new_stream()

    @property
    def strict(self) -> bool:
        """Whether operations that wait for the device by themselves are refused."""
        started = bool(self.holders) and all(self.holders.values())
        return started and self.options.host_reads == "refuse"

    # Streams.

    def new_stream(self) -> Stream:
        """A stream with a cache of its own."""
        stream = Stream(next(self._numbers), self.allocator.new_pool())
        self.streams.append(stream)
        return stream

    @property
    def current(self) -> Stream:
        """The calling thread's stream."""
        stream: Stream = getattr(self._local, "stream", self.home)
        return stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Make a stream current in this thread."""
        before, self._local.stream = self.current, stream
        try:
            yield
        finally:
            self._local.stream = before

    def record_event(self) -> Event:
        """This point of the current stream."""
        return Event(self, self.current)

    # Work.

    def launch(
        self,
        name: str,
        run: Callable[[], object],
        reads: Sequence[Block] = (),
        writes: Sequence[Block] = (),
    ) -> None:
        """Queue work on the current stream, or record it.

        Raises:
            RaceError: It touches memory that other work is not known to be done with.
            DeviceLostError: The device is lost.
        """
        tape = self.tape
        if tape is not None:
            tape.record(Task(name, run, reads, writes))
            return
        with self.lock:
            if self.strikes("launch"):
                self._lost = self._lost or RuntimeError("it was told to fail")
            self._require_alive()
            stream = self.current
            merge(stream.clock, self.host_clock)
            access = Access(stream.number, stream.launched + 1, name)
            _touch(reads, writes, stream.clock, access)
            stream.launched = stream.clock[stream.number] = access.number
            stream.tasks.append(Task(name, run, reads, writes, tuple(stream.after)))
            stream.after.clear()
            self.schedule.launched(stream)
            self._require_alive()

    def run_next(self, stream: Stream) -> None:
        """Run the oldest work of a stream; for schedules."""
        task = stream.tasks[0]
        if self._lost is None:
            try:
                with torch.no_grad():
                    task.run()
            except Exception as error:
                error.add_note(
                    f"in {task.name}, on stream {stream.number} of a simulated device"
                )
                self._lost = error
        with self.lock:
            stream.tasks.popleft()
            stream.done += 1

    def finish(self, event: Event, why: str) -> None:
        """Let the host wait for an event.

        Raises:
            CaptureError: This thread captures a graph.
            DeviceLostError: Work failed on the way.
        """
        self.forbid_in_capture(why, "waits for the device")
        with self.lock:
            self.waits[why] += 1
            self._finish(event)
            self._require_alive()

    def synchronize(self) -> None:
        """Let the host wait for everything."""
        self.forbid_in_capture("synchronize", "waits for the device")
        with self.lock:
            self.waits["synchronize"] += 1
            for stream in self.streams:
                self._finish(Event(self, stream))
            self._require_alive()

    def _finish(self, event: Event) -> None:
        self.schedule.finish(event.stream, event.number)
        merge(self.host_clock, event.clock)

    def read(self, name: str) -> None:
        """Let the host wait because an operation reads values.

        Raises:
            RaceError: Such operations are refused.
        """
        if self.strict and self.tape is None:
            raise RaceError(
                f"{name} reads values on the host and waits for the device to do so, in the "
                "midst of work. Copy to pinned memory and wait for an event, or allow it with "
                "the option host_reads=force"
            )
        self.finish(self.record_event(), name)

    # Capture.

    @property
    def tape(self) -> Tape | None:
        """Where the calling thread's work is recorded, if it is."""
        tape: Tape | None = getattr(self._local, "tape", None)
        return tape

    @contextmanager
    def capture(self, tape: Tape) -> Iterator[None]:
        """Record this thread's work instead of queueing it."""
        tape.pool.rewind()
        self._local.tape = tape
        try:
            yield
        finally:
            self._local.tape = None

    def forbid_in_capture(self, what: str, does: str) -> None:
        """Refuse what no graph can hold."""
        if self.tape is not None:
            raise CaptureError(
                f"{what} {does} while a graph is captured. Do it before, or leave it out of "
                "the recorded part"
            )

    # Memory.

    def allocate(self, nbytes: int) -> Allocation:
        """Memory of the current stream's cache, or of the graph's pool.

        Raises:
            torch.OutOfMemoryError: There is too little, or it was told to fail.
        """
        tape = self.tape
        with self.lock:
            if self.strikes("allocation"):
                raise torch.OutOfMemoryError(
                    f"simulated device out of memory: {nbytes:,} bytes were asked for, and the "
                    "device was told to fail"
                )
            pool = self.current.pool if tape is None else tape.pool
            return self.allocator.allocate(nbytes, pool, recorded=tape is not None)

    def new_pinned(self, num_bytes: int) -> Tensor:
        """``[num_bytes]`` uint8 of the host that copies read and write late; kept for good."""
        self.forbid_in_capture("empty_host", "allocates memory outside the graph's pool")
        block = Block(torch.empty(max(2, num_bytes + num_bytes % 2), dtype=torch.uint8))
        poison(block.bytes)
        self._pinned[block.address] = block
        return block.bytes[:num_bytes]

    def pinned(self, tensor: Tensor) -> Block | None:
        """The pinned memory that a host tensor lies in, if it does."""
        return self._pinned.get(tensor.untyped_storage().data_ptr())

    def touch_from_host(self, block: Block, name: str, *, write: bool) -> None:
        """The host reads pinned memory, or could write it.

        Raises:
            RaceError: Queued work still uses it.
        """
        with self.lock:
            check(block, self.host_clock, name, write=write)

    # Faults.

    def fail(self, what: str, after: int) -> None:
        """Let the n-th of ``options.FAULTS`` from now on fail; 0 = never."""
        self._faults[what] = after

    def strikes(self, what: str) -> bool:
        """Count one; whether it is the one that fails."""
        left = self._faults.get(what, 0)
        self._faults[what] = max(0, left - 1)
        return left == 1

    def close(self) -> None:
        """End the schedule; what was not waited for never runs."""
        self.schedule.close()

    def _require_alive(self) -> None:
        if self._lost is not None:
            cause = f"{type(self._lost).__name__}: {self._lost}"
            where = "; ".join(getattr(self._lost, "__notes__", ()))
            raise DeviceLostError(
                f"The simulated device is lost: {cause}{f' ({where})' if where else ''}. "
                "Nothing runs on it any more; close its engines, then start a new engine"
            ) from self._lost


def _touch(
    reads: Sequence[Block], writes: Sequence[Block], clock: Clock, access: Access
) -> None:
    for block in reads:
        check(block, clock, access.name, write=False)
    for block in writes:
        check(block, clock, access.name, write=True)
    for block in reads:
        note(block, access, write=False)
    for block in writes:
        note(block, access, write=True)
