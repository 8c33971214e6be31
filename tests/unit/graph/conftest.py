# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from bedplate.batch.forward_mode import CaptureHiddenMode
from bedplate.contract.graph import GraphRunnerRequest
from bedplate.testing.graphs import CountingRuntime, TapeGraphRunner
from bedplate.testing.tiny_decoder import TinyAttention, TinyDecoder, decode_batch

if TYPE_CHECKING:
    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.batch.logits import LogitsOutput
    from bedplate.contract.decisions import Decision


@pytest.fixture(autouse=True)
def _thawed():
    """Some test environments freeze what they have imported; these tests count from none."""
    before = gc.get_freeze_count()
    gc.unfreeze()
    yield
    if before:
        gc.freeze()


@dataclass
class Bench:
    """A tape runner around the tiny decoder, and everything it reports."""

    sizes: tuple[int, ...] = (1, 2, 4, 8)
    hidden: tuple[CaptureHiddenMode, ...] = (CaptureHiddenMode.NULL,)
    changes: dict[str, Any] = field(default_factory=dict)
    runner_type: type[TapeGraphRunner] = TapeGraphRunner

    def __post_init__(self) -> None:
        self.runtime = CountingRuntime()
        self.attention = TinyAttention()
        self.model = TinyDecoder(self.attention)
        self.seen: list[ForwardBatch] = []
        self.decisions: list[Decision] = []
        self.progress: list[tuple[int, int]] = []
        self.runner = self.runner_type(self.request(**self.changes))

    def request(self, **changes: Any) -> GraphRunnerRequest:
        request = GraphRunnerRequest(
            runtime=self.runtime,
            forward=self.forward,
            attention=self.attention,
            capture_sizes=self.sizes,
            hidden_modes=self.hidden,
            index_dtype="int64",
            record=self.decisions.append,
            progress=lambda done, total: self.progress.append((done, total)),
        )
        return dataclasses.replace(request, **changes)

    def forward(self, batch: ForwardBatch) -> LogitsOutput:
        self.seen.append(batch)
        return self.model(batch)

    def captured(self) -> Bench:
        self.runner.capture()
        return self

    def batch(self, lengths: list[int], **options: Any) -> ForwardBatch:
        return decode_batch(lengths, self.attention, **options)

    def eager(self, batch: ForwardBatch) -> LogitsOutput:
        with self.runtime.inference_guard():
            self.attention.prepare_in_graph(batch)
            return self.model(batch)

    def replay(self, batch: ForwardBatch) -> LogitsOutput:
        assert self.runner.can_run(batch)
        with self.runtime.inference_guard():
            return self.runner.replay(batch)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> type[Bench]:
    # Two full collections per capture would be most of the time of these tests.
    monkeypatch.setattr(gc, "collect", lambda: 0)
    return Bench
