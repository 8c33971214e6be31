# SPDX-License-Identifier: Apache-2.0
"""What torch for ROCm answers through ``torch.cuda``, with the traps of its graphs.

Tensors stay on the host; streams, captures and figures are pretended.  A capture is ended by
what ends one on a device (ROCm 7.0 and later): an event that is asked by another thread in the
mode ``global``, a kernel whose code is loaded first, a wait, a function of the host.  It then
fails when it closes, and its pool is refused until another is made.
"""

from __future__ import annotations

import inspect
import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from kernels.tests.pools import Pool, as_tensor

from bedplate.contract import ActivateRequest
from bedplate_rocm.ops import _features
from bedplate_rocm.runtime import HipRuntime

GRAPH = inspect.signature(torch.cuda.graph)
GIB = 1 << 30


class HostRuntime(HipRuntime):
    """The runtime on the surface; its tensors live where this machine has memory."""

    @property
    def device(self):
        return torch.device("cpu")

    def empty_cache(self):
        torch.cuda.empty_cache()


class HipSurface:
    """Pretends one device for as long as the monkeypatch lasts.

    Attributes:
        properties: What ``get_device_properties`` gives.
        log: What was asked, in order.
        loaded: Kernels whose code the device has.
        capture: The capture that is going on: mode, thread, pool and what ended it.
        pools: Memory of graphs, by the handle of their pool.
        broken_pools: Handles of pools that a failed capture left unusable.
        failure: Raised when the device is taken.
        free_bytes: What ``mem_get_info`` says is free.
    """

    def __init__(self, monkeypatch, arch="gfx942:sramecc+:xnack-"):
        self.properties = SimpleNamespace(
            name="AMD Instinct MI300X", gcnArchName=arch, multi_processor_count=304,
            major=9, minor=4, is_integrated=False,
        )  # fmt: skip
        self.log, self.loaded, self.broken_pools = [], set(), set()
        self.capture, self.failure, self.free_bytes, self.pools = None, None, 100 * GIB, {}
        self.home, self.current = self._stream("home"), None
        self.current = self.home
        _features.cache_clear()
        monkeypatch.setattr(torch.version, "hip", "7.1.0", raising=False)
        monkeypatch.setattr(torch.version, "cuda", None)
        ones = torch.ones
        monkeypatch.setattr(torch, "as_tensor", as_tensor)
        monkeypatch.setattr(torch, "ones", lambda *a, device=None, **o: ones(*a, **o))
        for name in (
            "set_device", "get_device_properties", "mem_get_info", "synchronize", "graph",
            "graph_pool_handle", "stream", "current_stream", "Stream", "CUDAGraph",
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))
        plain = {
            "current_device": lambda: 0,
            "get_device_capability": lambda _device: (9, 4),
            "memory_allocated": lambda _device: 2 * GIB,
            "empty_cache": lambda: self.log.append("empty cache"),
            "device": lambda _device: nullcontext(),
        }
        for name, function in plain.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def runtime(self, **environment):
        """The device, taken."""
        return HostRuntime(ActivateRequest(environment=environment))

    def launch(self, kernel):
        """A kernel begins; its code is loaded before the first time."""
        if kernel not in self.loaded:
            self._end("the code of a kernel was loaded")
            self.loaded.add(kernel)

    def host_function(self):
        """The host is to be called from the stream."""
        self._end("a host function")

    def query_event_elsewhere(self):
        """Another thread, such as one that watches collectives, asks for an event."""
        watchdog = threading.Thread(target=self._query_event)
        watchdog.start()
        watchdog.join()

    def _query_event(self):
        capture = self.capture
        if capture and (capture.mode == "global" or capture.thread == threading.get_ident()):
            self._end("an event was asked")

    def _end(self, cause):
        if self.capture and not self.capture.ended:
            self.capture.ended = cause

    def _set_device(self, _device):
        if self.failure is not None:
            raise self.failure

    def _get_device_properties(self, _device):
        return self.properties

    def _mem_get_info(self, _device):
        return self.free_bytes, 192 * GIB

    def _synchronize(self, _device=None):
        if self.capture:
            self._end("a wait")
            raise RuntimeError("HIP error: operation not permitted when stream is capturing")
        self.log.append("wait")

    def _graph_pool_handle(self):
        handle = f"pool {len(self.pools) + 1}"
        self.pools[handle] = Pool()
        return handle

    def _stream(self, name):
        if not isinstance(name, str):  # torch.cuda.stream(stream)
            return self._use(name)
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"),
        )

    def _Stream(self, _device):
        return self._stream("side")

    def _current_stream(self, _device=None):
        return self.current

    @contextmanager
    def _use(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def _CUDAGraph(self):
        return _Graph(self)

    @contextmanager
    def _graph(self, *arguments, **options):
        given = GRAPH.bind(*arguments, **options).arguments  # as the real one takes them
        pool = given["pool"]
        if pool in self.broken_pools:
            raise RuntimeError("HIP error: capture is invalidated")
        mode = given["capture_error_mode"]
        self.log.append(f"capture {pool} {given['stream'].name} {mode}")
        capture = self.capture = SimpleNamespace(
            mode=mode, thread=threading.get_ident(), ended=""
        )
        try:
            with self._use(given["stream"]):
                yield
        except BaseException:
            self.broken_pools.add(pool)
            raise
        finally:
            self.capture = None
        if capture.ended:
            self.broken_pools.add(pool)
            raise RuntimeError(
                f"HIP error: operation failed due to a previous error during capture: "
                f"{capture.ended}"
            )


class _Graph:
    """Runs the captured part again, into the results of the capture."""

    def __init__(self, surface):
        self.surface, self.run, self.output = surface, None, None

    def replay(self):
        assert not self.surface.capture
        fresh = self.run()
        self.output.next_token_logits.copy_(fresh.next_token_logits)
