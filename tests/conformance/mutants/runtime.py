# SPDX-License-Identifier: Apache-2.0
"""Mistakes of a device's few promises.

``LateRuntime`` copies to host memory only when it is waited for, as a device that works on its
own: sound itself, it is what the mutants that forget to wait inherit from.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from tests.conformance.mutants.base import mutant

from bedplate.contract import MemoryStatus
from bedplate_cpu.runtime import CpuRuntime


class LateTensor(torch.Tensor):
    """Host memory into which copies arrive late."""

    queue: list = []  # noqa: RUF012 - one device, one queue

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.copy_ and kwargs.get("non_blocking"):
            plain = args[0].as_subclass(torch.Tensor)
            cls.queue.append((plain, args[1].clone()))
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def deliver(cls):
        while cls.queue:
            target, source = cls.queue.pop(0)
            target.copy_(source)


class LateEvent:
    def __init__(self):
        self.reached = False

    def synchronize(self):
        LateTensor.deliver()
        self.reached = True

    def query(self):
        if not self.reached:
            self.synchronize()
            return False
        return True


class LateRuntime(CpuRuntime):
    """Sound, and asynchronous."""

    def empty_host(self, num_bytes):
        return super().empty_host(num_bytes).as_subclass(LateTensor)

    def record_event(self):
        return LateEvent()

    def synchronize(self):
        LateTensor.deliver()


def late(capabilities):
    memory = replace(capabilities.memory, asynchronous=True)
    return replace(capabilities, memory=memory)


class EarlyEvent(LateEvent):
    def synchronize(self):
        self.reached = True


class UnsynchronisedEvent(LateRuntime):
    def record_event(self):
        return EarlyEvent()


class UnsynchronisedDevice(LateRuntime):
    def synchronize(self):
        pass


class HastyQuery(LateRuntime):
    def record_event(self):
        event = LateEvent()
        event.query = lambda: True
        return event


class NeverReached(CpuRuntime):
    def record_event(self):
        event = LateEvent()
        event.query = lambda: False
        return event


class MoreFreeThanTotal(CpuRuntime):
    def memory(self):
        return MemoryStatus(free_bytes=2 << 30, total_bytes=1 << 30)


class FrozenFigures(CpuRuntime):
    def memory(self):
        return MemoryStatus(free_bytes=1 << 30, total_bytes=2 << 30)


class NoSeed(CpuRuntime):
    def seed(self, seed):
        pass


class OneSeed(CpuRuntime):
    def seed(self, seed):
        torch.manual_seed(0)


class WithAutograd(CpuRuntime):
    def inference_guard(self):
        return nullcontext()


class LeakyGuard(CpuRuntime):
    @contextmanager
    def inference_guard(self):
        torch.set_grad_enabled(False)
        try:
            yield
        finally:
            torch.set_grad_enabled(False)


class ForgetsOnError(CpuRuntime):
    @contextmanager
    def inference_guard(self):
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        yield
        torch.set_grad_enabled(before)


class Misaligned(CpuRuntime):
    def empty_host(self, num_bytes):
        return super().empty_host(num_bytes + 1)[1:]


class OneBuffer(CpuRuntime):
    shared = torch.zeros(1 << 20, dtype=torch.uint8)

    def empty_host(self, num_bytes):
        start = -self.shared.data_ptr() % 64
        return self.shared[start : start + num_bytes]


class LeavesThreads(CpuRuntime):
    def shutdown(self):
        torch.set_num_threads(torch.get_num_threads() + 1)


class LeavesDefaultDtype(CpuRuntime):
    def __init__(self, request):
        super().__init__(request)
        torch.set_default_dtype(torch.float64)


class OnlyOnce(CpuRuntime):
    taken = 0

    def __init__(self, request):
        super().__init__(request)
        type(self).taken += 1
        if type(self).taken > 1:
            raise RuntimeError("the device is taken")


MUTANTS = {
    "unsynchronised_event": mutant(
        1,
        "an event is reached before the work before it",
        runtime=UnsynchronisedEvent,
        capabilities=late,
    ),
    "unsynchronised_device": mutant(
        1, "synchronize() does not wait", runtime=UnsynchronisedDevice, capabilities=late
    ),
    "hasty_query": mutant(1, "query() says yes at once", runtime=HastyQuery, capabilities=late),
    "event_never_reached": mutant(
        1, "query() never says yes", runtime=NeverReached, only="L1/event_orders_work"
    ),
    "more_free_than_total": mutant(
        1, "more memory free than there is", runtime=MoreFreeThanTotal
    ),
    "frozen_memory_figures": mutant(
        1,
        "free memory never changes",
        runtime=FrozenFigures,
        capabilities=lambda c: replace(c, memory=replace(c.memory, unified=False)),
    ),
    "seed_is_ignored": mutant(1, "seed() does nothing", runtime=NoSeed),
    "one_seed": mutant(1, "every seed is the same", runtime=OneSeed),
    "guard_with_autograd": mutant(
        1, "autograd stays on inside of the guard", runtime=WithAutograd
    ),
    "guard_leaks": mutant(1, "autograd stays off after the guard", runtime=LeakyGuard),
    "guard_forgets_on_error": mutant(
        1, "autograd stays off after an error in the guard", runtime=ForgetsOnError
    ),
    "misaligned_host_memory": mutant(
        1, "host memory begins at odd addresses", runtime=Misaligned
    ),
    "one_host_buffer": mutant(1, "all host memory is the same", runtime=OneBuffer),
    "leaves_threads": mutant(
        1, "another number of threads after shutdown", runtime=LeavesThreads
    ),
    "leaves_default_dtype": mutant(
        1, "another default dtype after shutdown", runtime=LeavesDefaultDtype
    ),
    "activates_once": mutant(1, "a second activation fails", runtime=OnlyOnce),
    "claims_asynchronous": mutant(1, "claims to work on its own", capabilities=late),
    "claims_pinned": mutant(
        1,
        "claims page-locked host memory",
        capabilities=lambda c: replace(c, memory=replace(c.memory, pinned_host=True)),
    ),
    "claims_a_dtype_it_cannot_copy": mutant(
        1,
        "claims a dtype that it cannot copy",
        only="L1/copies/*",
        capabilities=lambda c: replace(c, kv_dtypes=(*c.kv_dtypes, "float4_e2m1fn_x2")),
    ),
}
