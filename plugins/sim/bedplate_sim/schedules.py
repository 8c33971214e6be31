# SPDX-License-Identifier: Apache-2.0
"""When queued work runs.

Every schedule keeps the order within a stream and that of events; they differ in all that a
device is free to choose.  What is right under each of them is ordered by more than luck.
"""

from __future__ import annotations

__all__ = ["Eager", "Lazy", "Random", "Threaded", "make_schedule"]

import random
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bedplate_sim.device import Device, Stream


class Lazy:
    """Nothing runs before somebody waits for it: the simplest schedule, and the base of all."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def launched(self, stream: Stream) -> None:
        """Work was queued."""

    def finish(self, stream: Stream, number: int) -> None:
        """Come as far as ``number`` on a stream."""
        while stream.done < number:
            for other, before in stream.tasks[0].after:
                self.finish(other, before)
            self.device.run_next(stream)

    def poll(self, stream: Stream) -> None:
        """Somebody asked how far the stream is: come a little further, so that asking ends."""
        self.finish(stream, min(stream.done + 1, stream.launched))

    def close(self) -> None:
        """No more work comes."""


class Eager(Lazy):
    """Everything runs at once, as on a device that is faster than the host."""

    def launched(self, stream: Stream) -> None:
        """Run it."""
        self.finish(stream, stream.launched)


class Random(Lazy):
    """Some work of some streams runs now and then, by a seed."""

    def __init__(self, device: Device, seed: int) -> None:
        super().__init__(device)
        self._random = random.Random(seed)

    def launched(self, stream: Stream) -> None:
        """Run up to three pieces of work, each of a stream that could go on."""
        for _ in range(self._random.randrange(4)):
            self._advance()

    def finish(self, stream: Stream, number: int) -> None:
        """Run whatever can until it is done."""
        while stream.done < number:
            self._advance()

    def _advance(self) -> None:
        ready = [stream for stream in self.device.streams if stream.ready]
        if ready:
            self.device.run_next(self._random.choice(ready))


class Threaded(Lazy):
    """A thread for each stream, as on a device that works beside the host."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._moved = threading.Condition(device.lock)
        self._threads: dict[int, threading.Thread] = {}
        self._closing = False

    def launched(self, stream: Stream) -> None:
        """Tell the stream's thread."""
        if stream.number not in self._threads:
            name = f"bedplate-sim-{stream.number}"
            thread = threading.Thread(target=self._work, args=(stream,), name=name, daemon=True)
            self._threads[stream.number] = thread
            thread.start()
        self._moved.notify_all()

    def finish(self, stream: Stream, number: int) -> None:
        """Sleep until it is done."""
        with self._moved:
            self._moved.wait_for(lambda: stream.done >= number)

    def poll(self, stream: Stream) -> None:
        """The thread needs no help."""

    def close(self) -> None:
        """End the threads."""
        with self._moved:
            self._closing = True
            self._moved.notify_all()
        for thread in self._threads.values():
            thread.join()

    def _work(self, stream: Stream) -> None:
        while True:
            with self._moved:
                self._moved.wait_for(lambda: self._closing or stream.ready)
                if self._closing:
                    return
            self.device.run_next(stream)
            with self._moved:
                self._moved.notify_all()


def make_schedule(name: str, device: Device, seed: int) -> Lazy:
    """The schedule of that name."""
    if name == "random":
        return Random(device, seed)
    return {"eager": Eager, "lazy": Lazy, "threaded": Threaded}[name](device)
