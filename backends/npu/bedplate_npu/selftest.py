# SPDX-License-Identifier: Apache-2.0
"""The self-test at start-up: attention and graphs against the reference, on the device itself.

What documents say about an operator and what an installed CANN does are two things: page sizes
have corrupted silently, and an update that the driver does not know leaves old lengths in a
graph.  So a few small passes are compared before anything is offered; what differs is switched
off, and its reason goes into the decisions.

Shapes: H query heads, K key/value heads, D head size, Dv value size.
"""

from __future__ import annotations

__all__ = ["SideBySide", "call_of", "run_self_test"]

import logging
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
from bedplate.batch.forward_mode import CaptureHiddenMode, ForwardMode
from bedplate.batch.logits import LogitsOutput
from bedplate.contract import (
    AttentionBackend,
    AttentionBuild,
    AttentionCallSpec,
    GraphRunnerRequest,
    KVPoolRequest,
)
from bedplate.memory.kv_pool import LayeredKVPool
from bedplate.reference.attention import ReferenceAttention
from bedplate.reference.runtime import TorchRuntime
from bedplate_npu import ops
from bedplate_npu.attention import FusedInferAttention
from bedplate_npu.graph import NpuGraphRunner
from bedplate_npu.memory import NpuKVPool

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bedplate_npu.runtime import NpuRuntime

_log = logging.getLogger(__name__)

_LIMIT = 2e-2
"""Largest difference, relative to the largest result: a few roundings of bfloat16."""
_PAGES = 2
_STEPS = ((130, 5), (3, 20), (1, 1), (1, 1))
"""New tokens of two requests: whole prompts over a page border, extensions, decode."""


class SideBySide:
    """The same passes by the device's attention and, in float32 on the host, by the reference.

    Args:
        runtime: The device.
        calls: Attention calls, each with a number of its own.
        requests: How many requests there are.
        pages: Pages of each.
        dtype: Of the device's side.

    Attributes:
        attention: The device's side.
        lens: Tokens of each request so far.
    """

    def __init__(
        self,
        runtime: TorchRuntime,
        calls: Sequence[AttentionCallSpec],
        *,
        requests: int = 2,
        pages: int = _PAGES,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.calls, self.lens = tuple(calls), [0] * requests
        self._runtime, self._dtype = runtime, dtype
        self._chance = torch.Generator().manual_seed(7)
        width = pages * ops.PAGE_SIZE
        self._table = torch.zeros((requests + 1, width), dtype=torch.int32)
        self._table[1:] = torch.arange(requests * width).view(requests, width) + ops.PAGE_SIZE
        host = TorchRuntime("cpu")
        self.attention = FusedInferAttention(self._build(runtime, NpuKVPool, dtype))
        self._reference = ReferenceAttention(self._build(host, LayeredKVPool, torch.float32))

    def step(self, counts: Sequence[int], mode: ForwardMode) -> float:
        """One pass with new tokens for every request; the largest relative difference."""
        worst = 0.0
        device, host = self.batches(counts, mode)
        self.attention.prepare(device)
        self.attention.prepare_in_graph(device)
        for call in self.calls:
            q, k, v, sinks = self.draw(call, sum(counts))
            got = self.attend(self.attention, call, device, (q, k, v, sinks))
            want = self.attend_reference(call, host, (q, k, v, sinks))
            worst = max(worst, _difference(got, want))
        return worst

    def batches(
        self, counts: Sequence[int], mode: ForwardMode
    ) -> tuple[ForwardBatch, ForwardBatch]:
        """The next pass, on the device and on the host; the lengths move on."""
        prefix = list(self.lens)
        self.lens = [old + new for old, new in zip(prefix, counts, strict=True)]
        host = self._batch(torch.device("cpu"), prefix, counts, mode)
        return self._batch(self._runtime.device, prefix, counts, mode), host

    def draw(
        self, call: AttentionCallSpec, tokens: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Random queries, keys, values and sinks, rounded as the device stores them."""

        def rows(heads: int, size: int) -> Tensor:
            return torch.randn(tokens, heads, size, generator=self._chance).to(self._dtype)

        v = None if call.value_in_key else rows(call.num_kv_heads, call.value_dim)
        sinks = torch.randn(call.num_heads, generator=self._chance).to(self._dtype)
        q, k = rows(call.num_heads, call.head_dim), rows(call.num_kv_heads, call.head_dim)
        return q, k, v, sinks if call.sinks else None

    def attend(
        self,
        attention: AttentionBackend,
        call: AttentionCallSpec,
        batch: ForwardBatch,
        inputs: Sequence[Tensor | None],
    ) -> Tensor:
        """``[T, H, Dv]`` of one side, with inputs in its dtype."""
        place = batch.input_ids.device
        dtype = torch.float32 if attention is self._reference else self._dtype
        moved = [None if x is None else x.to(dtype).to(place) for x in inputs]
        q, k, v, sinks = moved
        assert q is not None
        return attention.forward(q, k, v, call, batch, sinks=sinks)

    def attend_reference(
        self, call: AttentionCallSpec, batch: ForwardBatch, inputs: Sequence[Tensor | None]
    ) -> Tensor:
        """``[T, H, Dv]`` float32 on the host."""
        return self.attend(self._reference, call, batch, inputs)

    def _build(
        self,
        runtime: TorchRuntime,
        pool: type[LayeredKVPool],
        dtype: torch.dtype,
    ) -> AttentionBuild:
        request = KVPoolRequest(
            runtime=runtime, calls=self.calls, page_size=ops.PAGE_SIZE, dtype=dtype,
            num_tokens=self._table[1:].numel(),
        )  # fmt: skip
        return AttentionBuild(
            runtime=runtime, calls=self.calls, kv_pool=pool(request), dtype=dtype,
            req_to_token=self._table.to(runtime.device), page_size=ops.PAGE_SIZE,
            max_batch_size=len(self.lens), max_context_len=self._table.shape[1],
        )  # fmt: skip

    def _batch(
        self, device: torch.device, prefix: list[int], counts: Sequence[int], mode: ForwardMode
    ) -> ForwardBatch:
        def ints(values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype)

        places = [
            (row, column)
            for row, (start, new) in enumerate(zip(prefix, counts, strict=True))
            for column in range(start, start + new)
        ]
        slots = [int(self._table[row + 1, column]) for row, column in places]
        total = [start + new for start, new in zip(prefix, counts, strict=True)]
        extend = None
        if not mode.is_decode():
            new = ints(counts)
            extend = ExtendPart(
                seq_lens=new.to(device), prefix_lens=ints(prefix).to(device),
                start_loc=(new.cumsum(0, dtype=torch.int32) - new).to(device),
                seq_lens_cpu=new, prefix_lens_cpu=ints(prefix),
            )  # fmt: skip
        return ForwardBatch(
            mode=mode, batch_size=len(total), extend=extend,
            input_ids=ints([0] * len(slots), torch.int64).to(device),
            positions=ints([column for _, column in places], torch.int64).to(device),
            req_pool_indices=ints(range(1, len(total) + 1)).to(device),
            seq_lens=ints(total).to(device), seq_lens_cpu=ints(total),
            out_cache_loc=ints(slots).to(device),
        )  # fmt: skip


def call_of(call_id: int = 0, **changes: Any) -> AttentionCallSpec:
    """A small call with grouped heads of 64."""
    numbers: dict[str, Any] = {
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "value_dim": 64, "scale": 0.11,
    }  # fmt: skip
    return AttentionCallSpec(call_id=call_id, module="self-test", **(numbers | changes))


def run_self_test(runtime: NpuRuntime) -> Mapping[str, str]:
    """Every feature that failed, and how; empty if all agree with the reference."""
    latent = {"num_kv_heads": 1, "head_dim": 576, "value_dim": 512, "value_in_key": True}
    calls = {
        "attention": call_of(),
        "windows": call_of(window=70),
        "sinks": call_of(sinks=True, window=70),
        "latents": call_of(**latent),
    }
    if not ops.has("npu_fused_infer_attention_score_v2"):
        del calls["sinks"]
    tests: dict[str, Callable[[], float]] = {
        feature: lambda call=call: _worst(runtime, call)  # type: ignore[misc]
        for feature, call in calls.items()
    }
    if not runtime.graph_problem:
        tests["graphs"] = lambda: _graph_difference(runtime)
    off = {}
    with runtime.inference_guard():
        for feature, test in tests.items():
            problem = _problem(test)
            if problem:
                off[feature] = f"the self-test found that {problem}"
                _log.warning("%s is switched off: %s", feature, off[feature])
    return MappingProxyType(off)


def _problem(test: Callable[[], float]) -> str:
    """What a test found wrong; empty if nothing."""
    try:
        worst = test()
    except Exception as error:  # whatever an unknown device raises, it cannot be used
        cause = str(error).partition("\n")[0].rstrip(".")
        return f"it fails with {type(error).__name__}: {cause}"
    if worst <= _LIMIT:
        return ""
    return f"results are {worst:.1e} away from the reference, limit {_LIMIT:.0e}"


def _worst(runtime: NpuRuntime, call: AttentionCallSpec) -> float:
    both = SideBySide(runtime, [call])
    worst = 0.0
    for counts in _STEPS:
        mode = ForwardMode.DECODE if max(counts) == 1 else ForwardMode.EXTEND
        worst = max(worst, both.step(counts, mode))
    return worst


def _graph_difference(runtime: NpuRuntime) -> float:
    """Two layers, captured once and replayed at two lengths, against the same passes."""
    both = SideBySide(runtime, [call_of(), call_of(1)])
    both.step((130, 5), ForwardMode.EXTEND)
    inputs = [[_on(x, runtime) for x in both.draw(call, 2)] for call in both.calls]

    def forward(batch: ForwardBatch) -> LogitsOutput:
        parts = [
            both.attend(both.attention, call, batch, tensors)
            for call, tensors in zip(both.calls, inputs, strict=True)
        ]
        return LogitsOutput(next_token_logits=torch.cat(parts, dim=1).flatten(1))

    failed: list[Any] = []
    runner = NpuGraphRunner(
        GraphRunnerRequest(
            runtime=runtime, forward=forward, attention=both.attention, capture_sizes=(2,),
            hidden_modes=(CaptureHiddenMode.NULL,), index_dtype="int32", record=failed.append,
        )
    )  # fmt: skip
    runner.capture()
    if failed:
        raise RuntimeError(failed[0].candidates[0].reason)
    worst = 0.0
    for _ in range(2):
        batch, _host = both.batches((1, 1), ForwardMode.DECODE)
        got = runner.replay(batch).next_token_logits.clone()
        both.attention.prepare(batch)
        both.attention.prepare_in_graph(batch)
        worst = max(worst, _difference(got, forward(batch).next_token_logits))
    runner.release()
    return worst


def _on(x: Tensor | None, runtime: NpuRuntime) -> Tensor | None:
    return None if x is None else x.to(runtime.device)


def _difference(got: Tensor, want: Tensor) -> float:
    got, want = got.float().cpu(), want.float().cpu()
    if not got.isfinite().all():
        return float("inf")
    return float((got - want).abs().max() / want.abs().max())
