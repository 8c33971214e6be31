# SPDX-License-Identifier: Apache-2.0
"""One life of a small model without its products: prompts, extensions, recorded decode.

Every pass is compared with the reference on the host, by numbers.  What goes wrong in it is
what the seeded mistakes of ``test_mistakes`` show.
"""

from __future__ import annotations

__all__ = ["LIMIT", "Scenario"]

import torch

from bedplate.batch.forward_mode import CaptureHiddenMode, ForwardMode
from bedplate.batch.logits import LogitsOutput
from bedplate.contract import GraphRunnerRequest
from bedplate_npu.graph import NpuGraphRunner
from bedplate_npu.selftest import SideBySide, call_of

LIMIT = 2e-2
CALLS = (call_of(0), call_of(1, window=70), call_of(2, sinks=True))
REQUESTS, BUCKET, STEPS = 3, 4, 4


class Scenario:
    """Attention of three layers, one with a window and one with sinks.

    Args:
        runtime: The device.
        rebind: Replace a static input instead of copying into it; one of the mistakes.
        inside: Called with the batch within each recorded pass.
        calls: Attention calls.
        pages: Of each request.
    """

    def __init__(self, runtime, *, rebind=False, inside=None, calls=CALLS, pages=2):
        self.runtime, self.calls = runtime, calls
        self.both = SideBySide(runtime, self.calls, requests=REQUESTS, pages=pages)
        self.rebind, self.inside = rebind, inside
        self.inputs = None
        self.decisions = []

    def worst(self) -> float:
        """The largest relative difference of all passes."""
        worst = self.both.step((130, 5, 127), ForwardMode.EXTEND)
        worst = max(worst, self.both.step((3, 20, 1), ForwardMode.MIXED))
        self.runner = self.make_runner()
        self.runner.capture()
        if self.decisions:
            raise RuntimeError(self.decisions[0].candidates[0].reason)
        worst = max(worst, self.replays())
        return max(worst, self.both.step((2, 2, 2), ForwardMode.TARGET_VERIFY))

    def make_runner(self, sizes=(BUCKET,)):
        drawn = [self.both.draw(call, BUCKET) for call in self.calls]
        self.inputs = [self._on_device(four) for four in drawn]
        return NpuGraphRunner(
            GraphRunnerRequest(
                runtime=self.runtime, forward=self.forward, attention=self.both.attention,
                capture_sizes=sizes, hidden_modes=(CaptureHiddenMode.NULL,),
                index_dtype="int32", record=self.decisions.append,
            )
        )  # fmt: skip

    def forward(self, batch):
        if self.inside is not None:
            self.inside(batch)
        rows = batch.batch_size
        parts = []
        for call, (*three, sinks) in zip(self.calls, self.inputs, strict=True):
            cut = [None if x is None else x[:rows] for x in three]
            out = self.both.attend(self.both.attention, call, batch, (*cut, sinks))
            parts.append(out.flatten(1))
        return LogitsOutput(next_token_logits=torch.cat(parts, dim=1))

    def replays(self, steps=STEPS) -> float:
        """Decode steps by the graph, each with new numbers.

        As an engine that runs ahead does, nothing waits for the device between them.
        """
        fresh = [[self.both.draw(call, REQUESTS) for call in self.calls] for _ in range(steps)]
        ours = [[self._on_device(four) for four in step] for step in fresh]
        batches = [self.both.batches((1,) * REQUESTS, ForwardMode.DECODE) for _ in range(steps)]
        got = []
        for step, (device, _host) in zip(ours, batches, strict=True):
            self._refresh(step)
            assert self.runner.can_run(device)
            got.append(self.runner.replay(device).next_token_logits.clone())
        return max(
            difference(out, self._reference(step, host))
            for out, step, (_device, host) in zip(got, fresh, batches, strict=True)
        )

    def _on_device(self, four):
        return [None if x is None else x.to(self.runtime.device) for x in four]

    def _refresh(self, step):
        for static, new in zip(self.inputs, step, strict=True):
            for index in range(3):
                if new[index] is None:
                    continue
                if self.rebind:
                    static[index] = torch.cat((new[index], new[index][:1]))
                else:
                    static[index][:REQUESTS].copy_(new[index])

    def _reference(self, step, host):
        parts = [
            self.both.attend_reference(call, host, (*four[:3], _host(static[3]))).flatten(1)
            for call, four, static in zip(self.calls, step, self.inputs, strict=True)
        ]
        return torch.cat(parts, dim=1)


def difference(got, want):
    """Relative to the largest wanted number."""
    got = got.float().cpu()
    if not got.isfinite().all():
        return float("inf")
    return float((got - want).abs().max() / want.abs().max())


def _host(x):
    return None if x is None else x.cpu()
