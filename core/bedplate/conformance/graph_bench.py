# SPDX-License-Identifier: Apache-2.0
"""GraphBench: the backend's graph runner around the smallest decoder there is.

What the decoder computes depends on every input slot, so whatever a replay forgets to renew
changes its logits; its cache shows whatever padding writes.  It attends by the kit's own
attention, or, where the runner records no other, by the one that an engine would choose.
"""

from __future__ import annotations

__all__ = ["SIZES", "GraphBench"]

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch

from bedplate.batch.forward_mode import CaptureHiddenMode
from bedplate.conformance.check import Wrong, require
from bedplate.conformance.graph_attention import EngineAttention, KitAttention
from bedplate.contract.graph import GraphRunnerRequest
from bedplate.reference.closeness import relative_error
from bedplate.testing.tiny_decoder import decode_batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.batch.logits import LogitsOutput
    from bedplate.conformance.graph_attention import BenchAttention
    from bedplate.contract.decisions import Decision
    from bedplate.graph.runner import GraphRunner
    from bedplate.registry.bind import BoundBackend
    from bedplate.testing.tiny_decoder import TinyDecoder

SIZES = (1, 2, 4)
_POISON = {
    "input_ids": 7, "positions": 5, "req_pool_indices": 9, "seq_lens": 11, "seq_lens_cpu": 11,
}  # fmt: skip
"""Legal but wrong values, as an earlier batch might have left them."""
_POISONED_TOKEN = (8, 4)
"""Row and column of the table whose slot they name."""
_EXACT = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.2e-2}
"""Relative error that is allowed: padded products may be summed in another order."""


class GraphBench:
    """A runner, what it runs, and everything that it reports.

    Args:
        bound: The backend.
        sizes: Buckets.
        forward: Put between runner and decoder; takes the decoder's pass and the batch.
        hidden: Hidden-state modes.
        kits: Whether to try the kit's own attention first.

    Attributes:
        place: Attention, cache and decoder.
        decisions: What the runner recorded since it was made.
        prepared: The last batch that attention was prepared for.

    Raises:
        Wrong: The backend makes no graph runner.
    """

    prepared: ForwardBatch

    def __init__(
        self, bound: BoundBackend, *, sizes: tuple[int, ...] = SIZES,
        forward: Callable[[TinyDecoder, ForwardBatch], Any] | None = None,
        hidden: tuple[CaptureHiddenMode, ...] = (CaptureHiddenMode.NULL,), kits: bool = True,
    ) -> None:  # fmt: skip
        self.runtime = bound.runtime
        self.decisions: list[Decision] = []

        def make(place: BenchAttention) -> GraphRunner | None:
            model = place.model
            self._watch(place)
            request = GraphRunnerRequest(
                runtime=bound.runtime,
                forward=model if forward is None else lambda batch: forward(model, batch),
                attention=place.attention,
                capture_sizes=sizes,
                hidden_modes=hidden,
                index_dtype=place.index_dtype,
                record=self.decisions.append,
            )
            made: GraphRunner | None = bound.make_graph_runner(request)
            return made

        self.place: BenchAttention = (KitAttention if kits else EngineAttention)(bound)
        runner = make(self.place)
        if runner is None and kits and self.decisions:  # it says why it does not record ours
            self.decisions.clear()
            self.place = EngineAttention(bound)
            runner = make(self.place)
        if runner is None:
            raise Wrong(f"makes no graph runner{self._reasons()}")
        self.runner = runner

    @property
    def exact(self) -> float:
        """Relative error that a replay may have against the eager pass."""
        return _EXACT[self.place.dtype]

    def captured(self) -> GraphBench:
        """Capture every bucket; every one must succeed."""
        self.runner.capture()
        require(not self.decisions, f"captures fail{self._reasons()}")
        return self

    def batch(self, lengths: list[int], **options: Any) -> ForwardBatch:
        """A decode batch over the bench's cache, of requests that are longer by ``cached``."""
        place = self.place
        batch = decode_batch([n + place.cached for n in lengths], place, **options)
        slots = batch.out_cache_loc.to(getattr(torch, place.index_dtype))
        return replace(batch, out_cache_loc=slots)

    def eager(self, batch: ForwardBatch) -> LogitsOutput:
        """The pass without a graph."""
        with self.runtime.inference_guard():
            self.place.attention.prepare(batch)
            self.place.attention.prepare_in_graph(batch)
            return self.place.model(batch)  # type: ignore[no-any-return]

    def replay(self, batch: ForwardBatch) -> LogitsOutput:
        """The pass by a graph.

        Raises:
            Wrong: No graph serves it.
        """
        answer = self.runner.can_run(batch)
        require(answer, f"no graph serves {batch.batch_size} requests: {answer.reason}")
        with self.runtime.inference_guard():
            return self.runner.replay(batch)

    def compare(self, lengths: list[int], limit: float, *, seed: int = 0) -> float:
        """Eager, then replay, from the same cache; the larger relative error of both outputs.

        Raises:
            Wrong: They differ by more than ``limit``, in logits or in what they left in the
                cache beyond padding's page.
        """
        batch = self.batch(lengths, seed=seed, first_row=1 + seed % 5)
        start = self.copied()
        want = self.eager(batch).next_token_logits.cpu().clone()
        after = self.cache()
        self.restore(start)
        got = self.replay(batch).next_token_logits.cpu()
        require(
            got.shape == want.shape, f"logits are {list(got.shape)}, not {list(want.shape)}"
        )
        error = relative_error(got, want)
        require(
            error <= limit,
            f"{len(lengths)} requests: a replay differs from the eager pass by {error:.1e}, "
            f"allowed {limit:.0e}",
        )
        left = relative_error(self.cache(), after)
        require(left <= limit, "a replay leaves another cache than the eager pass: padding or "
                f"a stale slot wrote to it ({left:.1e})")  # fmt: skip
        return error

    def copied(self) -> list[Tensor]:
        """Keys and values as they are now, on the device."""
        return [stored.clone() for stored in self.place.stored()]

    def restore(self, start: list[Tensor]) -> None:
        """Keys and values as they were."""
        for stored, was in zip(self.place.stored(), start, strict=True):
            stored.copy_(was)

    def cache(self) -> Tensor:
        """Keys and values on the host, page 0 left out: padding writes there."""
        self.runtime.synchronize()
        parts = [stored[self.place.page_size :] for stored in self.place.stored()]
        return torch.stack(parts).cpu().clone()

    def poison(self) -> None:
        """Put wrong values into every row of the static slots."""
        resident = self.runner.resident(self.runner.request.capture_sizes[-1])
        slot = int(self.place.req_to_token[_POISONED_TOKEN].cpu())
        for field in fields(resident):
            value = getattr(resident, field.name)
            poison = {**_POISON, "out_cache_loc": slot}.get(field.name)
            if isinstance(value, torch.Tensor) and poison is not None:
                value.fill_(poison)

    def _watch(self, place: BenchAttention) -> None:
        """Keep the batch that attention was prepared for last."""
        prepare = place.attention.prepare

        def watched(batch: ForwardBatch) -> None:
            self.prepared = batch
            prepare(batch)

        vars(place.attention)["prepare"] = watched

    def _reasons(self) -> str:
        told = [f"{d.point}: {d.candidates[0].reason}" for d in self.decisions]
        return f": {'; '.join(told)}" if told else ""
