# SPDX-License-Identifier: Apache-2.0
"""GraphBench: the backend's graph runner around the smallest decoder there is.

What the decoder computes depends on every input slot, so whatever a replay forgets to renew
changes its logits; its cache shows whatever padding writes.
"""

from __future__ import annotations

__all__ = ["SIZES", "GraphBench"]

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from bedplate.batch.forward_mode import CaptureHiddenMode
from bedplate.conformance.check import Wrong, require
from bedplate.contract.graph import GraphRunnerRequest
from bedplate.reference.closeness import relative_error
from bedplate.testing.tiny_decoder import TinyAttention, TinyDecoder, decode_batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.batch.logits import LogitsOutput
    from bedplate.contract.decisions import Decision
    from bedplate.graph.runner import GraphRunner
    from bedplate.registry.bind import BoundBackend

SIZES = (1, 2, 4)
_POISON = {
    "input_ids": 7, "positions": 5, "req_pool_indices": 9, "seq_lens": 11, "seq_lens_cpu": 11,
    "out_cache_loc": 100,
}  # fmt: skip
"""Legal but wrong values, as an earlier batch might have left them."""


class GraphBench:
    """A runner, what it runs, and everything that it reports.

    Args:
        bound: The backend.
        sizes: Buckets.
        forward: Put between runner and decoder; takes the decoder's pass and the batch.
        hidden: Hidden-state modes.

    Raises:
        Wrong: The backend makes no graph runner.
    """

    def __init__(
        self, bound: BoundBackend, *, sizes: tuple[int, ...] = SIZES,
        forward: Callable[[TinyDecoder, ForwardBatch], Any] | None = None,
        hidden: tuple[CaptureHiddenMode, ...] = (CaptureHiddenMode.NULL,),
    ) -> None:  # fmt: skip
        self.bound, self.runtime = bound, bound.runtime
        self.attention = TinyAttention(device=str(self.runtime.device))
        self.model = TinyDecoder(self.attention, str(self.runtime.device))
        self.decisions: list[Decision] = []
        run = self.model if forward is None else lambda batch: forward(self.model, batch)
        made: GraphRunner | None = bound.make_graph_runner(
            GraphRunnerRequest(
                runtime=self.runtime,
                forward=run,
                attention=self.attention,
                capture_sizes=sizes,
                hidden_modes=hidden,
                index_dtype="int64",
                record=self.decisions.append,
            )
        )
        if made is None:
            raise Wrong("makes no graph runner")
        self.runner = made

    def captured(self) -> GraphBench:
        """Capture every bucket; every one must succeed."""
        self.runner.capture()
        refused = [f"{d.point}: {d.candidates[0].reason}" for d in self.decisions]
        require(not refused, f"captures fail: {'; '.join(refused)}")
        return self

    def batch(self, lengths: list[int], **options: Any) -> ForwardBatch:
        """A decode batch over the bench's cache."""
        return decode_batch(lengths, self.attention, **options)

    def eager(self, batch: ForwardBatch) -> LogitsOutput:
        """The pass without a graph."""
        with self.runtime.inference_guard():
            self.attention.prepare(batch)
            self.attention.prepare_in_graph(batch)
            return self.model(batch)  # type: ignore[no-any-return]

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
                cache beyond slot 0.
        """
        batch = self.batch(lengths, seed=seed, first_row=1 + seed % 5)
        start = [self.attention.keys.clone(), self.attention.values.clone()]
        want = self.eager(batch).next_token_logits.cpu().clone()
        after = self.cache()
        self.attention.keys.copy_(start[0])
        self.attention.values.copy_(start[1])
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

    def cache(self) -> Tensor:
        """Keys and values on the host, slot 0 left out: padding writes there."""
        self.runtime.synchronize()
        parts = [self.attention.keys[1:], self.attention.values[1:]]
        return torch.stack(parts).cpu().clone()

    def poison(self) -> None:
        """Put wrong values into every row of the static slots."""
        resident = self.runner.resident(self.runner.request.capture_sizes[-1])
        for field in fields(resident):
            slot = getattr(resident, field.name)
            if isinstance(slot, torch.Tensor) and field.name in _POISON:
                slot.fill_(_POISON[field.name])
