# SPDX-License-Identifier: Apache-2.0
"""Compile what a pass would launch, all of it at once and without running it.

A compile takes about a second, and a first pass launches dozens of kernels one after the
other.  In this context launches return at once; their kernels are compiled by copies of the
process, as many as there are cores, and lie ready in the disk's cache when it ends.  (Threads
would take turns: much of the compiler is Python.)  What kernels would have written stays as it
was, so only passes whose results nobody wants belong here.
"""

from __future__ import annotations

__all__ = ["compile_ahead"]

import os
import signal
import time
import warnings
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import triton
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_NUMBER = 2
"""Bytes of a job's number."""
_PATIENCE_S = 120.0
"""A copy that takes longer is stuck, and its kernels are compiled here."""


@contextmanager
def compile_ahead() -> Iterator[None]:
    """Collect launches; leave when all their kernels are compiled.

    A kernel that cannot be compiled says so when it is launched for real.
    """
    function: Any = triton.runtime.JITFunction
    run = function.run
    begun: set[Any] = set()
    compiles = _Compiles()

    def collect(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Compile for what sorts of arguments these are; layers repeat each other's."""
        sorts = (kernel, *map(_sort, args), *((n, _sort(v)) for n, v in options.items()))
        if sorts not in begun:
            begun.add(sorts)
            run(kernel, *args, grid=grid, warmup=True, **options)

    function.run = collect
    try:
        with triton.AsyncCompileMode(compiles, ignore_errors=True):
            try:
                yield
            finally:
                compiles.finish()
    finally:
        function.run = run


def _sort(value: Any) -> Any:
    """Equal for arguments that no kernel is compiled anew for."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return type(value), value


class _Compiles(Executor):
    """Has jobs done by copies of the process: when there are enough of them, and at last."""

    def __init__(self) -> None:
        self._jobs: list[tuple[Future[Any], Callable[[], Any]]] = []
        self._begun = 0
        self._copies: list[int] = []
        self._cores = max(2, os.cpu_count() or 1)

    def submit(self, job: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        """Take one compile."""
        future: Future[Any] = Future()
        self._jobs.append((future, job))
        if len(self._jobs) - self._begun == self._cores:
            self._begin(self._cores // 2)
        return future

    def finish(self) -> None:
        """Wait for the copies; then take all from the disk's cache."""
        self._begin(self._cores)
        deadline = time.monotonic() + _PATIENCE_S
        for copy in self._copies:
            _await_copy(copy, deadline)
        with ThreadPoolExecutor(self._cores) as pool:
            for future, job in self._jobs:
                pool.submit(_fulfil, future, job)

    def _begin(self, most: int) -> None:
        """Have the jobs that nobody does yet done by at most so many copies."""
        jobs = [job for _, job in self._jobs[self._begun :]]
        self._begun = len(self._jobs)
        self._copies += _start_copies(jobs, min(most, len(jobs)))


def _fulfil(future: Future[Any], job: Callable[[], Any]) -> None:
    try:
        future.set_result(job())
    except BaseException as error:
        future.set_exception(error)


def _start_copies(jobs: Sequence[Callable[[], Any]], count: int) -> list[int]:
    """Copies that run jobs for what they leave on the disk; what fails there is left undone."""
    if not count or not hasattr(os, "fork"):
        return []
    with warnings.catch_warnings():
        # Threads do not survive in a copy. None of them compiles, so no lock of the compiler
        # is held; and a copy asks nothing of the device.
        warnings.simplefilter("ignore", DeprecationWarning)
        queue = _queue(len(jobs))
        copies = [_start_copy(jobs, queue) for _ in range(count)]
        os.close(queue)
    return copies


def _queue(count: int) -> int:
    """A pipe's end from which each number below ``count`` is read once, by whoever asks.

    The last come first: prompts are rehearsed behind decode passes and compile for longer.
    """
    out, into = os.pipe()
    os.write(
        into, b"".join(number.to_bytes(_NUMBER, "big") for number in reversed(range(count)))
    )
    os.close(into)
    return out


def _start_copy(jobs: Sequence[Callable[[], Any]], queue: int) -> int:
    copy = os.fork()
    if copy:
        return copy
    try:
        while number := os.read(queue, _NUMBER):
            with suppress(BaseException):
                _make_launcher(jobs[int.from_bytes(number, "big")]())
    finally:
        os._exit(0)  # nothing of the original is this copy's to clean up


def _make_launcher(kernel: Any) -> None:
    """Leave on the disk what launches a kernel, too: some releases have it compiled in C."""
    triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)


def _await_copy(copy: int, deadline: float) -> None:
    while os.waitpid(copy, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(copy, signal.SIGKILL)
            os.waitpid(copy, 0)
            return
        time.sleep(0.005)
