# SPDX-License-Identifier: Apache-2.0
"""L5: recorded passes, captured once and replayed after whatever else."""

from __future__ import annotations

__all__ = ["checks"]

import gc
from typing import TYPE_CHECKING

import torch

from bedplate.batch.forward_mode import CaptureHiddenMode
from bedplate.conformance.check import Check, Leave, require
from bedplate.conformance.graph_bench import SIZES, GraphBench
from bedplate.contract.decisions import Support
from bedplate.errors import UnsupportedError
from bedplate.reference.closeness import relative_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.conformance.subject import Subject
    from bedplate.testing.tiny_decoder import TinyDecoder

_GRAPH_BYTES = 256 << 20
"""Memory that one graph of the smallest decoder may take."""


def checks(subject: Subject) -> Iterator[Check]:
    """One check per property; none is tried where no graphs are declared."""
    graph = subject.capabilities.graph
    claim = Support.yes() if graph.supported else Support.no("graph.supported is off")
    properties: dict[str, Callable[[Subject], dict[str, float] | None]] = {
        "replay_equals_eager": _replay_equals_eager,
        "lengths_grow": _lengths_grow,
        "poisoned_slots": _poisoned_slots,
        "interleaved": _interleaved,
        "buckets_take_turns": _buckets_take_turns,
        "queued": _queued,
        "weights_in_place": _weights_in_place,
        "stable_addresses": _stable_addresses,
        "recapture": _recapture,
        "hidden_states": _hidden_states,
        "host_read": _host_read,
        "failing_capture": _failing_capture,
        "memory": _memory,
        "engine_attention": _engine_attention,
    }
    for name, run in properties.items():
        yield Check(level=5, name=name, run=run, declared=claim)


def _limit(subject: Subject, bench: GraphBench) -> float:
    return subject.tolerance(bench.exact)


def _shared(subject: Subject) -> GraphBench:
    """One captured bench for the checks that leave it as it was: captures take time."""
    return subject.keep("graphs", lambda: GraphBench(subject.bound).captured())


def _replay_equals_eager(subject: Subject) -> dict[str, float]:
    """Every number of requests, padded or not."""
    bench = _shared(subject)
    limit = _limit(subject, bench)
    sizes = range(1, SIZES[-1] + 1)
    worst = [bench.compare([3 + i for i in range(n)], limit, seed=n) for n in sizes]
    return {"error": max(worst)}


def _lengths_grow(subject: Subject) -> None:
    """Lengths, positions and slots of later steps are seen, not those of the capture."""
    bench = _shared(subject)
    limit = _limit(subject, bench)
    for length in range(2, 11):
        bench.compare([length, 3, length + 1], limit, seed=length)


def _poisoned_slots(subject: Subject) -> None:
    """What earlier batches left in the slots changes neither logits nor cache."""
    bench = _shared(subject)
    limit = _limit(subject, bench)
    for lengths in ([4], [5, 2, 7], [3, 3, 3, 3], [6, 2]):
        bench.poison()
        bench.compare(lengths, limit, seed=len(lengths))


def _interleaved(subject: Subject) -> None:
    """Eager passes in between change nothing."""
    bench = _shared(subject)
    limit = _limit(subject, bench)
    for turn in range(3):
        bench.compare([4 + turn, 2, 3], limit, seed=turn)
        bench.eager(bench.batch([9, 1, 5, 2], seed=turn + 9))
        bench.compare([2, 4 + turn], limit, seed=turn + 3)


def _buckets_take_turns(subject: Subject) -> None:
    """Graphs that share a pool do not disturb each other."""
    bench = _shared(subject)
    limit = _limit(subject, bench)
    for turn in range(2):
        for size in (4, 1, 3, 2, 4):
            bench.compare([3 + turn + i for i in range(size)], limit, seed=turn)


def _queued(subject: Subject) -> None:
    """Replays one behind the other, none waited for: each has its own lengths and slots."""
    bench = _shared(subject)
    batches = [bench.batch(lengths, seed=len(lengths)) for lengths in
               ([3, 7, 2], [8, 4], [5, 5, 9, 3], [10], [4, 8, 3])]  # fmt: skip
    start = bench.copied()
    want = [bench.eager(batch).next_token_logits.clone() for batch in batches]
    bench.restore(start)
    bench.runtime.synchronize()
    got = [bench.replay(batch).next_token_logits.clone() for batch in batches]
    for number, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        error = relative_error(ours.cpu(), theirs.cpu())
        require(
            error <= _limit(subject, bench),
            f"replay {number + 1} of {len(got)} in a row is another by {error:.1e}",
        )


def _weights_in_place(subject: Subject) -> None:
    """A weight that is updated where it lies is used."""
    bench = _shared(subject)
    limit = _limit(subject, bench)
    with torch.no_grad():
        bench.place.model.embedding.mul_(0.5)
    try:
        bench.compare([3, 5], limit)
    finally:
        with torch.no_grad():
            bench.place.model.embedding.mul_(2.0)


def _stable_addresses(subject: Subject) -> None:
    """The static slots do not move, and only padding's row and slot are used by padding."""
    bench = _shared(subject)
    largest = SIZES[-1]

    def addresses() -> list[int]:
        slots = _tensors(bench.runner.resident(largest))
        return [tensor.data_ptr() for tensor in slots]

    before = addresses()
    padded = bench.batch([1])
    for lengths in ([6, 5, 4], [4, 2, 3]):
        batch = bench.batch(lengths)
        bench.replay(batch)
        padded, want = bench.prepared, batch.seq_lens_cpu.tolist()
        seen = padded.seq_lens_cpu.tolist()[:3]
        require(seen == want, f"host lengths are {seen}, not {want}: they are stale")
    require(addresses() == before, "static slots move between replays")
    require(padded.req_pool_indices.tolist()[3:] == [0], "padding is not in request row 0")
    require(padded.out_cache_loc.tolist()[3:] == [0], "padding does not write to slot 0")
    fill = bench.place.attention.seq_len_fill_value
    require(padded.seq_lens.tolist()[3:] == [fill], "padding has another length than asked for")
    require(padded.seq_lens.tolist() == padded.seq_lens_cpu.tolist(), "host lengths are stale")


def _tensors(batch: ForwardBatch) -> list[torch.Tensor]:
    """The tensors of a batch, in the order of their fields."""
    values = [getattr(batch, name) for name in batch.__dataclass_fields__]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _recapture(subject: Subject) -> None:
    """After release, over a cache that has grown, everything is captured anew."""
    bench = GraphBench(subject.bound, sizes=(2,)).captured()
    limit = _limit(subject, bench)
    bench.compare([3, 4], limit)
    bench.runner.release()
    require(not bench.runner.captured, "release() keeps graphs")
    require(not bench.runner.can_run(bench.batch([3])), "a released runner accepts a batch")
    bench.place.grow()
    bench.captured()
    bench.compare([5, 2], limit, seed=1)


def _hidden_states(subject: Subject) -> None:
    """Graphs with and without hidden states side by side."""
    hidden = (CaptureHiddenMode.NULL, CaptureHiddenMode.LAST)
    bench = GraphBench(subject.bound, sizes=(2,), hidden=hidden).captured()
    limit = _limit(subject, bench)
    batch = bench.batch([3, 6], hidden=CaptureHiddenMode.LAST)
    want = bench.eager(batch).hidden_states
    got = bench.replay(batch).hidden_states
    require(got is not None, "a graph that should keep hidden states gives none")
    assert got is not None
    assert want is not None
    gap = float((got - want).abs().max())
    require(gap <= limit * float(want.abs().max()), f"hidden states differ by {gap:.1e}")
    bench.compare([3, 6], limit)


def _host_read(subject: Subject) -> None:
    """A part that reads the device on the host is refused with a record, or replayed right."""

    def reads(model: TinyDecoder, batch: ForwardBatch) -> object:
        output = model(batch)
        output.next_token_logits.mul_(float(batch.seq_lens.max().item()))
        return output

    bench = GraphBench(subject.bound, sizes=(2,), forward=reads)
    bench.runner.capture()
    if bench.decisions:
        (decision,) = bench.decisions
        require(decision.chosen == "eager", f"falls back to '{decision.chosen}', not to eager")
        require(decision.candidates[0].reason, "a failing capture gives no reason")
        require(not bench.runner.can_run(bench.batch([3, 3])), "a failed graph accepts batches")
        return
    batch = bench.batch([3, 7])
    want = bench.eager(batch).next_token_logits * float(batch.seq_lens_cpu.max())
    got = bench.replay(batch).next_token_logits
    same = torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    require(same, "a host read is baked into the graph in silence")


def _failing_capture(subject: Subject) -> None:
    """One bucket that fails is recorded, a larger one serves it, and nobody else suffers."""

    def fails(model: TinyDecoder, batch: ForwardBatch) -> object:
        if batch.batch_size == 1:
            raise RuntimeError("out of memory, injected by the kit")
        return model(batch)

    bench = GraphBench(subject.bound, sizes=(1, 2), forward=fails)
    bench.runner.capture()
    points = [d.point for d in bench.decisions]
    require(points == ["graph.1"], f"one failing bucket gives the decisions {points}")
    reason = bench.decisions[0].candidates[0].reason
    require("injected" in reason, f"the reason does not name the cause: {reason}")
    limit = _limit(subject, bench)
    bench.compare([4, 2], limit)
    bench.compare([5], limit)


def _memory(subject: Subject) -> dict[str, float]:
    """Graphs take bounded memory, and give it back."""
    if subject.capabilities.memory.unified:
        bench = _shared(subject)
        require(bench.runner.memory_bytes >= 0, "memory_bytes is negative")
        return {"graph_bytes": float(bench.runner.memory_bytes)}
    runtime = subject.bound.runtime
    gc.collect()
    runtime.empty_cache()
    before = runtime.memory().free_bytes
    bench = GraphBench(subject.bound).captured()
    taken = bench.runner.memory_bytes
    bound = _GRAPH_BYTES * len(SIZES)
    require(taken <= bound, f"{len(SIZES)} graphs take {taken >> 20} MiB")
    bench.runner.release()
    del bench
    gc.collect()
    runtime.empty_cache()
    lost = before - runtime.memory().free_bytes
    require(lost <= _GRAPH_BYTES, f"{lost >> 20} MiB do not come back after release()")
    return {"graph_bytes": float(taken)}


def _engine_attention(subject: Subject) -> dict[str, float]:
    """The attention that an engine would choose, recorded: lengths, padding, stale slots."""
    try:
        bench = GraphBench(subject.bound, sizes=(4,), kits=False).captured()
    except UnsupportedError as error:
        raise Leave(error.message) from error
    limit, worst = _limit(subject, bench), []
    for turn, size in enumerate((4, 2, 1, 3, 4)):
        bench.poison()
        lengths = [2 + turn + i for i in range(size)]
        worst.append(bench.compare(lengths, limit, seed=turn))
    return {"error": max(worst)}
