# SPDX-License-Identifier: Apache-2.0
"""L1: the few things that the core asks of a device."""

from __future__ import annotations

__all__ = ["checks"]

import gc
import random
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import torch

from bedplate.conformance.check import Check, Wrong, require
from bedplate.conformance.subject import process_state
from bedplate.contract.decisions import Support

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from bedplate.conformance.subject import Subject

_BLOCK_BYTES = 64 << 20
_ALIGNMENT_BYTES = 64
_BUSY = 24
"""Products in a row: enough that an asynchronous device has not done them when asked."""
_SIZES = (256, 256, 1024, 2048)
"""Sizes of products, from what any device does soon to what the fastest needs a while for; the
first are for what a device does only once."""
_LONG_S = 0.2
"""Calls that take so long and leave nothing to do have done it themselves."""


def checks(subject: Subject) -> Iterator[Check]:
    """One check per promise."""
    memory = subject.capabilities.memory
    plain: dict[str, Callable[[Subject], dict[str, float] | None]] = {
        "device": _device,
        "memory_figures": _memory_figures,
        "event_orders_work": _event_orders_work,
        "synchronize": _synchronize,
        "event_query": _event_query,
        "host_memory": _host_memory,
        "seed": _seed,
        "inference_guard": _inference_guard,
        "activate_again": _activate_again,
        "shutdown": _shutdown,
        "process_is_left_alone": _process_is_left_alone,
        "ready_and_empty_cache": _ready_and_empty_cache,
        "index_dtype": _index_dtype,
    }
    for name, run in plain.items():
        yield Check(level=1, name=name, run=run)
    own = Support.no("memory.unified is on") if memory.unified else Support.yes()
    yield Check(
        level=1, name="memory_shrinks", run=_memory_shrinks, declared=own, attempt=False
    )
    pinned = Support.yes() if memory.pinned_host else Support.no("memory.pinned_host is off")
    yield Check(level=1, name="pinned_host", run=_pinned, declared=pinned)
    late = Support.yes() if memory.asynchronous else Support.no("memory.asynchronous is off")
    yield Check(level=1, name="asynchronous", run=_asynchronous, declared=late)
    have = subject.capabilities
    for dtype in dict.fromkeys((*have.compute_dtypes, *have.kv_dtypes)):
        yield Check(level=1, name=f"copies/{dtype}", run=partial(_copies, dtype))


def _device(subject: Subject) -> None:
    device, have = subject.device, subject.capabilities
    require(device.type == have.device_type, f"{device} is no {have.device_type}")
    made = torch.ones(2, device=device)
    same = (made.device.index or 0) == (device.index or 0)
    require(made.device.type == device.type and same, f"tensors lie on {made.device}")
    again = subject.bound.runtime.device
    require(again == device, f"the device changes from {device} to {again}")


def _memory_figures(subject: Subject) -> dict[str, float]:
    status = subject.bound.runtime.memory()
    require(0 < status.free_bytes <= status.total_bytes, f"free {status.free_bytes} of "
            f"{status.total_bytes} bytes")  # fmt: skip
    held = status.allocated_bytes
    require(0 <= held <= status.total_bytes, f"allocated {held} of {status.total_bytes} bytes")
    return {"total_gib": round(status.total_bytes / 2**30, 1)}


def _memory_shrinks(subject: Subject) -> None:
    """A tensor of X bytes takes X bytes, and gives them back."""
    runtime = subject.bound.runtime

    def figures() -> tuple[int, int]:
        gc.collect()
        runtime.synchronize()
        runtime.empty_cache()
        status = runtime.memory()
        return status.free_bytes, status.allocated_bytes

    free, held = figures()
    block = torch.ones(_BLOCK_BYTES, dtype=torch.uint8, device=runtime.device)
    less, more = figures()
    del block
    after, rest = figures()
    require(free - less >= _BLOCK_BYTES * 0.9, f"{_BLOCK_BYTES >> 20} MiB are allocated, and "
            f"free memory falls by {(free - less) >> 20} MiB")  # fmt: skip
    require(more - held >= _BLOCK_BYTES * 0.9, "allocated_bytes does not grow by what is held")
    require(after - less >= _BLOCK_BYTES * 0.9, "freed memory does not come back")
    require(rest <= held + _BLOCK_BYTES // 8, "allocated_bytes does not shrink again")


def _work(subject: Subject) -> tuple[Tensor, Tensor]:
    """Queued products and their result by the host: ``[256, 256]`` float32 each."""
    seed = torch.Generator().manual_seed(1)
    step = torch.linalg.qr(torch.randn((256, 256), generator=seed)).Q
    start = torch.randn((256, 256), generator=seed)
    want = start
    for _ in range(_BUSY):
        want = want @ step
    here, there = step.to(subject.device), start.to(subject.device)
    subject.bound.runtime.synchronize()
    for _ in range(_BUSY):
        there = there @ here
    return there, want


def _staged(subject: Subject, tensor: Tensor) -> Tensor:
    """A copy on the host that is under way: staging memory, not waited for."""
    raw = subject.bound.runtime.empty_host(tensor.numel() * tensor.element_size())
    raw.zero_()
    host = raw.view(tensor.dtype).view(tensor.shape)
    host.copy_(tensor, non_blocking=True)
    return host


def _close(got: Tensor, want: Tensor) -> bool:
    return bool(torch.allclose(got, want, rtol=1e-2, atol=1e-2))


def _event_orders_work(subject: Subject) -> None:
    """What was queued before an event is done when the event is reached."""
    for _ in range(3):
        result, want = _work(subject)
        host = _staged(subject, result)
        event = subject.bound.runtime.record_event()
        event.synchronize()
        require(_close(host, want), "an event is reached before the work that precedes it")
        require(event.query(), "query() denies an event that was waited for")


def _synchronize(subject: Subject) -> None:
    """After it, everything that was queued is done."""
    for _ in range(3):
        result, want = _work(subject)
        host = _staged(subject, result)
        subject.bound.runtime.synchronize()
        require(_close(host, want), "synchronize() returns before the work is done")


def _event_query(subject: Subject) -> None:
    """A query answers without waiting, and comes true."""
    result, want = _work(subject)
    host = _staged(subject, result)
    event = subject.bound.runtime.record_event()
    for _ in range(10_000_000):
        if event.query():
            break
    require(event.query(), "an event is never reached")
    require(_close(host, want), "query() says yes before the work is done")


def _asynchronous(subject: Subject) -> None:
    """Work is still under way when its call returns, if there is enough of it."""
    for number, size in enumerate(_SIZES):
        factor = torch.eye(size, device=subject.device)
        begin = time.perf_counter()
        for _ in range(_BUSY):
            factor = factor @ factor
        event = subject.bound.runtime.record_event()
        late = not event.query()
        seconds = time.perf_counter() - begin
        event.synchronize()
        if late:
            return
        if number and seconds > _LONG_S:
            break
    raise Wrong("every call has finished when it returns")


def _host_memory(subject: Subject) -> None:
    runtime = subject.bound.runtime
    blocks = [runtime.empty_host(size) for size in (1, 1000, 4096)]
    for block, size in zip(blocks, (1, 1000, 4096), strict=True):
        require(tuple(block.shape) == (size,), f"empty_host({size}) is {list(block.shape)}")
        require(block.dtype == torch.uint8, f"empty_host() gives {block.dtype}")
        require(block.device.type == "cpu", f"empty_host() lies on {block.device}")
        require(block.data_ptr() % _ALIGNMENT_BYTES == 0, "empty_host() is not aligned")
    for number, block in enumerate(blocks):
        block.fill_(number + 1)
    whole = all(bool((block == i + 1).all()) for i, block in enumerate(blocks))
    require(whole, "two pieces of host memory overlap")


def _pinned(subject: Subject) -> None:
    require(subject.bound.runtime.empty_host(64).is_pinned(), "empty_host() is not page-locked")


def _seed(subject: Subject) -> None:
    """Same seed, same numbers; another, others."""
    runtime = subject.bound.runtime

    def drawn(seed: int) -> Tensor:
        runtime.seed(seed)
        return torch.randn(64, device=runtime.device).cpu()

    first, second, again = drawn(1), drawn(2), drawn(1)
    require(torch.equal(first, again), "the same seed gives other numbers")
    require(not torch.equal(first, second), "two seeds give the same numbers")


def _inference_guard(subject: Subject) -> None:
    """No autograd inside; as before outside, also after an error."""
    runtime = subject.bound.runtime
    weight = torch.ones(2, device=runtime.device, requires_grad=True)
    with torch.enable_grad():
        with runtime.inference_guard():
            with runtime.inference_guard():
                inner = weight * 2
            outer = weight * 2
        with suppress(ZeroDivisionError), runtime.inference_guard():
            raise ZeroDivisionError
        after = weight * 2
    require(not inner.requires_grad, "autograd is on inside of the guard")
    require(not outer.requires_grad, "a nested guard turns autograd on")
    require(after.requires_grad, "the guard leaves autograd off")
    inner.mul_(2)  # tensors made inside may be changed later


def _activate_again(subject: Subject) -> None:
    """A second activation in the process works beside the first."""
    with subject.open() as other:
        made = torch.ones(4, device=other.bound.runtime.device)
        require(float(made.sum()) == 4.0, "the second activation cannot compute")
    made = torch.ones(4, device=subject.device)
    require(float(made.sum()) == 4.0, "shutting one down breaks the other")


def _shutdown(subject: Subject) -> None:
    """Twice is harmless, and the device can be taken again."""
    for _ in range(2):
        with subject.open() as opened:
            opened.bound.shutdown()
            opened.bound.shutdown()


def _process_is_left_alone(subject: Subject) -> None:
    """What is global in the process is as it was: while open, but for threads; when closed."""
    held = {n: v for n, v in process_state().items() if n != "threads"}
    changed = [name for name, value in held.items() if subject.found[name] != value]
    require(not changed, f"activation changes {', '.join(changed)} of the whole process")
    before = process_state(), random.getstate(), torch.get_rng_state().tolist()
    with subject.open():
        pass
    after = process_state(), random.getstate(), torch.get_rng_state().tolist()
    require(after == before, "threads, default dtype, seeds or the like are other afterwards")


def _ready_and_empty_cache(subject: Subject) -> None:
    runtime = subject.bound.runtime
    runtime.empty_cache()
    runtime.ready()
    rehearsal = runtime.rehearsal()
    if rehearsal is not None:
        with rehearsal:
            pass
    require(float(torch.ones(3, device=runtime.device).sum()) == 3.0, "cannot compute any more")


def _index_dtype(subject: Subject) -> None:
    """Slots of the declared type index storage, to read and to write."""
    index = getattr(torch, subject.capabilities.memory.index_dtype)
    table = torch.zeros((8, 2), device=subject.device)
    places = torch.tensor([5, 1], dtype=index, device=subject.device)
    table[places] = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=subject.device)
    require(table.cpu()[[5, 1]].tolist() == [[1, 2], [3, 4]], f"{index} does not index")
    require(table[places].cpu().tolist() == [[1, 2], [3, 4]], f"{index} does not index")


def _copies(dtype: str, subject: Subject) -> None:
    """There and back, bit for bit, also of what does not lie in one piece."""
    kind = getattr(torch, dtype)
    host = torch.randn((33, 17), generator=torch.Generator().manual_seed(2)).to(kind)
    there = host.to(subject.device)
    for view, want in ((there, host), (there[::2, 3:], host[::2, 3:]), (there.T, host.T)):
        back = view.cpu().contiguous().view(torch.uint8)
        require(torch.equal(back, want.contiguous().view(torch.uint8)), "a copy changes bits")
