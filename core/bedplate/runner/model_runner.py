# SPDX-License-Identifier: Apache-2.0
"""ModelRunner: a loaded model on one device, ready for passes.

A thin facade over parts that can be used alone: weights (``models``), pools (``memory``),
attention, graphs.  ``initialize`` is a list of named stages; engines and reinforcement-learning
systems may call them one by one, and everything they make is an attribute.
"""

from __future__ import annotations

__all__ = ["ModelRunner", "Progress"]

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bedplate.batch.forward_batch import ForwardBatch, pad_tokens
from bedplate.batch.forward_mode import CaptureHiddenMode
from bedplate.batch.logits import LogitsOutput
from bedplate.contract.attention import (
    AttentionBackend,
    AttentionBuild,
    AttentionProvider,
    AttentionRequest,
)
from bedplate.contract.graph import GraphRunnerRequest
from bedplate.contract.memory import AllocatorRequest, KVPoolRequest
from bedplate.errors import BedplateError, ContractError, DeviceMemoryError
from bedplate.graph.buckets import capture_sizes, first_sizes, memory_class, pad_to
from bedplate.graph.capture_state import freeze_gc
from bedplate.graph.pool import set_global_graph_memory_pool
from bedplate.graph.prompts import (
    MOST_REQUESTS,
    PromptGraphs,
    prompts_decision,
    token_sizes,
)
from bedplate.memory.factory import make_allocator, make_kv_pool
from bedplate.memory.req_to_token import ReqToTokenPool
from bedplate.memory.sizing import cell_bytes
from bedplate.models.weights.update import (
    UpdateResult,
    get_weights_by_name,
    update_weights_from_disk,
    update_weights_from_tensor,
)
from bedplate.runner.attention_overrides import prove_attention
from bedplate.runner.decode_loop import DecodeLoop, decode_requests
from bedplate.runner.dummy import dummy_prompt
from bedplate.runner.loading import load_ready
from bedplate.runner.overrides import prove_decode_loop
from bedplate.runner.pool_size import MemoryBudget, choose_pool_size

if TYPE_CHECKING:
    from pathlib import Path

    from bedplate.batch.schedule_batch import ScheduleBatch
    from bedplate.config import EngineConfig
    from bedplate.contract.memory import KVPool, TokenToKVPoolAllocator
    from bedplate.contract.ops import OpRegistry, OpRequest
    from bedplate.graph.runner import GraphRunner
    from bedplate.models.adapter import HFModel
    from bedplate.models.spec import ModelSpec
    from bedplate.models.weights.load import LoadedModel
    from bedplate.models.weights.update import Bucket, NamedTensors, UpdateFormat
    from bedplate.registry.bind import BoundBackend
    from bedplate.registry.decisions import DecisionLog
    from bedplate.runner.plan import RunPlan

logger = logging.getLogger(__name__)

_PADDED_STEPS = 64
"""Steps that a bucket's batches are padded to a larger one before its graph is captured amid
work: the capture costs about a step."""

_REHEARSED_TOKENS = (1, 3, 12, 24, 48, 100, 1024, 4100)
"""Lengths of prompts whose kernels are made ready: one for each class that kernels know."""
_REHEARSED_REQUESTS = (1, 2)
"""So many prompts share that length: kernels know one from several."""

_TRIED_ROWS = 17
"""Request rows of a decode loop that is only tried, the one of padding included."""

_MEM_FRACTION = 0.88
"""Share of the memory that was free before loading, unless the user says otherwise."""

Progress = Callable[[str, int, int], None]
"""Told (what, done, total) during long stages."""


class ModelRunner:
    """One model on one device.

    Args:
        config: The engine's settings.
        bound: The activated backend.
        decisions: Receives every choice.
        progress: Told about loading and capturing.

    Attributes:
        plan: Every "auto" resolved.
        loaded: Module, configuration and weight index.
        model: The module behind ``forward(ForwardBatch)``.
        req_to_token_pool: Request rows.
        kv_pool: Keys and values.
        allocator: Slots.
        attention: The attention backend.
        graph_runner: Recorded graphs, or ``None`` for eager passes.
        prompt_graphs: Recorded passes of prompts, or ``None``.
        decode_loop: What recorded passes keep on the device from step to step, where they
            sample too; else ``None``.
        stage_seconds: Stage → how long it took.
    """

    plan: RunPlan
    loaded: LoadedModel
    model: HFModel
    req_to_token_pool: ReqToTokenPool
    kv_pool: KVPool
    allocator: TokenToKVPoolAllocator
    attention: AttentionBackend
    graph_runner: GraphRunner | None = None
    prompt_graphs: PromptGraphs | None = None
    decode_loop: DecodeLoop | None = None

    def __init__(
        self,
        config: EngineConfig,
        bound: BoundBackend,
        decisions: DecisionLog,
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self.bound = bound
        self.decisions = decisions
        self.stage_seconds: dict[str, float] = {}
        self._progress = progress
        self._graph_bytes = 0
        self._free_before_load = 0
        self._provider: AttentionProvider | None = None
        self._resident: ForwardBatch | None = None
        self._padded: Counter[int] = Counter()
        self._token_sizes: tuple[int, ...] | None = None

    def stages(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        """The start-up, in order.

        Graphs are measured before the cache is sized: what they need is then taken out of
        the cache's share instead of failing later.
        """
        return (
            ("load_model", self.load_model),
            ("measure_graphs", self.measure_graphs),
            ("init_memory_pool", self.init_memory_pool),
            ("init_attention_backend", self.init_attention_backend),
            ("init_device_graphs", self.init_device_graphs),
        )

    def initialize(self) -> None:
        """Run every stage.

        Raises:
            BedplateError: The first failing stage's; vendor errors are explained by the
                backend where it can.
        """
        with freeze_gc():  # what is imported by now is not walked at every capture
            for name, stage in self.stages():
                begin = perf_counter()
                self._run_stage(name, stage)
                self.stage_seconds[name] = perf_counter() - begin
                logger.debug("%s took %.2f s", name, self.stage_seconds[name])
        self.bound.runtime.ready()
        for decision in self.bound.runtime.decisions():
            with self.decisions.choosing(decision.point) as decide:
                decide(decision)

    def _run_stage(self, name: str, stage: Callable[[], None]) -> None:
        try:
            stage()
        except BedplateError:
            raise
        except Exception as error:
            explained = self.bound.explain_error(error)
            if explained is None:
                raise
            raise BedplateError(f"{name} failed: {explained}", code="HW041") from error

    @property
    def spec(self) -> ModelSpec:
        """What the probe saw of the model."""
        return self.model.spec

    def load_model(self) -> None:
        """Probe, load weights, fuse."""
        self._free_before_load = self.bound.runtime.memory().free_bytes
        ready = load_ready(self.config, self.bound, self.decisions, self._report("weights"))
        self.plan, self.loaded, self.model = ready.plan, ready.loaded, ready.model
        self.bound.after_load(self.loaded.module)

    def measure_graphs(self) -> None:
        """Make kernels ready, capture the largest bucket, and note its bytes.

        On a cache of one page a request.  Where host and device share memory, graphs and cache
        do not compete for a fixed amount of it, and nothing is measured.
        """
        if not self.plan.graphs or self.bound.capabilities.memory.unified:
            return
        sizes = self._capture_sizes()
        self._make_pools(sizes[-1] * self.plan.page_size)
        self.init_attention_backend()
        runner = self._make_graph_runner(sizes)
        if runner is not None:
            prompts = self._make_prompt_graphs(runner)
            self._rehearse(runner, sizes, prompts)
            if prompts is not None and self.config.capture_tokens is None:
                self._token_sizes = prompts.worth_it()
                prompts = self._make_prompt_graphs(runner)
            before = self.bound.runtime.memory().free_bytes
            runner.capture(first=())
            if prompts is not None:
                prompts.capture(first=prompts.sizes[-1:])
            self._graph_bytes = max(0, before - self.bound.runtime.memory().free_bytes)
            del prompts
            runner.release()
            # An allocator may take no more into a pool whose last graph is gone.
            set_global_graph_memory_pool(self.bound.runtime, None)
        self.model.release_attention()
        del self.kv_pool, self.allocator, self.attention
        self.bound.runtime.empty_cache()

    def init_memory_pool(self) -> None:
        """Size the cache from what is left, and make rows, slots and storage.

        Raises:
            DeviceMemoryError: Nothing useful is left; the message has the numbers.
        """
        memory = self.bound.capabilities.memory
        budget = MemoryBudget(
            free_before_load_bytes=self._free_before_load,
            free_bytes=self.bound.runtime.memory().free_bytes,
            graph_bytes=self._graph_bytes,
            cell_bytes=self._cell_bytes(),
            unified=memory.unified,
            mem_fraction=self.config.mem_fraction or _MEM_FRACTION,
        )
        with self.decisions.choosing("kv_tokens") as decide:
            tokens, decision = choose_pool_size(
                budget,
                most_useful=self.plan.max_running_requests * self.plan.max_context_len,
                page_size=self.plan.page_size,
                asked=self.config.max_total_tokens,
            )
            decide(decision)
        self._make_pools(tokens)

    def init_attention_backend(self) -> None:
        """Choose the attention for the calls the model makes, and build it."""
        build = AttentionBuild(
            runtime=self.bound.runtime,
            calls=self.spec.calls,
            kv_pool=self.kv_pool,
            req_to_token=self.req_to_token_pool.req_to_token,
            page_size=self.plan.page_size,
            dtype=getattr(torch, self.plan.dtype),
            max_batch_size=self.plan.max_running_requests,
            max_context_len=self.plan.max_context_len,
            deterministic=self.config.deterministic,
        )
        if self._provider is None:
            self._provider = self._choose_attention(build)
        self.attention = self._provider.build(build)
        self.model.bind_attention(self.attention, self.kv_pool)

    def init_device_graphs(self) -> None:
        """Capture graphs, if the plan has them."""
        if not self.plan.graphs:
            return
        sizes = self._capture_sizes()
        self.graph_runner = self._make_graph_runner(sizes)
        if self.graph_runner is None:
            return
        prompts = self.prompt_graphs = self._make_prompt_graphs(self.graph_runner)
        with self.decisions.choosing("prompt_graphs") as decide:
            decide(prompts_decision(prompts, self._why_no_prompts()))
        if prompts is not None:  # these first: their pool serves all others
            prompts.capture(first_sizes(prompts.sizes))
        self.graph_runner.capture(first=first_sizes(sizes))

    def run(self, batch: ForwardBatch) -> tuple[LogitsOutput, int | None, str]:
        """One pass; which graph served it, or why none did.

        Returns:
            The output (views of the graph's memory if one was replayed), the graph's bucket
            or ``None``, and the reason for an eager pass.

        Raises:
            RequestTooLongError: A request is longer than the model serves correctly.
        """
        self.model.check_lengths(batch)
        runner = self.graph_runner
        reason = "graphs are off"
        if runner is not None and batch.mode.is_graph():
            answer = runner.can_run(batch)
            if answer:
                if self.decode_loop is not None and batch is not self._resident:
                    self.decode_loop.hold()
                output = runner.replay(batch)
                return output, runner.bucket_of(batch), ""
            reason = answer.reason
        elif self.prompt_graphs is not None:
            self.prompt_graphs.capture_if_worth_it(batch)
            answer = self.prompt_graphs.can_run(batch)
            if answer:
                bucket = self.prompt_graphs.bucket_of(batch)
                return self.prompt_graphs.replay(batch), bucket, ""
            reason = answer.reason
        elif runner is not None:
            reason = f"{batch.mode.name} passes run eagerly"
        return self._eager(batch), None, reason

    def load_decode(self, batch: ScheduleBatch) -> ForwardBatch | None:
        """Bring a decode pass to where a graph reads it, if one serves and samples it.

        Returns:
            The batch to ``run``; its output has tokens. ``None`` where the pass has to be
            staged.
        """
        loop, graphs, size = self.decode_loop, self.graph_runner, batch.batch_size
        if loop is None or graphs is None or not batch.mode.is_decode():
            return None
        if size > graphs.request.capture_sizes[-1] or not graphs.captured:
            return None
        if graphs.bucket_of(graphs.resident(size)) is None:
            return None
        self._resident = loop.load(batch, graphs)
        self._capture_if_worth_it(graphs, size)
        return self._resident

    def idle(self) -> bool:
        """Use a moment without work: capture a graph that waits. Whether more is to do."""
        if self.graph_runner is None:
            return False
        with self.bound.runtime.inference_guard():
            if self.prompt_graphs is not None and self.prompt_graphs.capture_next():
                return True
            return self.graph_runner.capture_next()

    def forward(self, batch: ForwardBatch) -> tuple[LogitsOutput, bool]:
        """One pass, by a graph where one fits; also says whether one did.

        Must run inside ``bound.runtime.inference_guard()``.

        Raises:
            ContractError: The mode never reaches a model.
        """
        if batch.mode.is_dummy_first() or batch.mode.is_split_prefill():
            raise ContractError(
                f"{batch.mode.name} is not a pass of the whole model; use EXTEND, DECODE, "
                "MIXED, TARGET_VERIFY or IDLE"
            )
        output, bucket, _reason = self.run(batch)
        return output, bucket is not None

    def forward_decode(self, batch: ForwardBatch) -> LogitsOutput:
        """An eager pass with one new token per request."""
        return self._eager(batch)

    def forward_extend(self, batch: ForwardBatch) -> LogitsOutput:
        """An eager pass with several new tokens per request."""
        return self._eager(batch)

    def forward_idle(self, batch: ForwardBatch) -> LogitsOutput:
        """A pass without tokens of its own: empty logits, and no attention metadata."""
        return self._idle(batch)

    def sample(self, output: LogitsOutput, batch: ForwardBatch) -> Tensor:
        """Greedy tokens of a pass, ``[R]`` int64 on the device.

        For engines of their own; ``runner.executor`` samples with every request's settings.
        """
        tokens: Tensor = output.next_token_logits.argmax(dim=-1)
        return tokens

    def update_weights_from_disk(self, folder: str | Path) -> UpdateResult:
        """Replace all weights in place by those of another checkpoint; all or nothing."""
        return self._updated(update_weights_from_disk(self.loaded.index, folder))

    def update_weights_from_tensor(
        self, named_tensors: NamedTensors | Bucket, load_format: UpdateFormat | None = None
    ) -> UpdateResult:
        """Replace some weights in place; all or nothing."""
        return self._updated(
            update_weights_from_tensor(self.loaded.index, named_tensors, load_format)
        )

    def get_weights_by_name(self, name: str, truncate_size: int = 100) -> list[Any]:
        """The first rows of one tensor as numbers, for comparisons."""
        return get_weights_by_name(self.loaded.index, name, truncate_size)

    def _updated(self, result: UpdateResult) -> UpdateResult:
        if result:
            self.bound.after_load(self.loaded.module)
        return result

    def _eager(self, batch: ForwardBatch) -> LogitsOutput:
        if batch.mode.is_idle() or not batch.batch_size:
            return self._idle(batch)
        if batch.logits_rows is not None and not batch.capture_hidden.need_capture():
            batch = pad_tokens(batch, self.attention.padded_tokens(batch))
        self.attention.prepare(batch)
        self.attention.prepare_in_graph(batch)
        return self.model.forward(batch)

    def _idle(self, batch: ForwardBatch) -> LogitsOutput:
        shape = (batch.num_tokens, self.spec.vocab_size)
        dtype = getattr(torch, self.plan.dtype)
        return LogitsOutput(
            next_token_logits=torch.empty(shape, dtype=dtype, device=batch.input_ids.device)
        )

    def _choose_attention(self, build: AttentionBuild) -> AttentionProvider:
        """The best that supports the model and, if a pack brings it, has proven itself."""
        providers, asked = self.bound.attention_providers, self.config.attention
        request = AttentionRequest(
            calls=self.spec.calls,
            dtype=self.plan.dtype,
            kv_dtype=self.plan.kv_dtype,
            page_size=self.plan.page_size,
            arch=self.bound.capabilities.arch,
            deterministic=self.config.deterministic,
        )
        while True:
            provider = providers.choose_attention(request, asked)
            rival = providers.next_best(request, provider)
            if rival is None or provider.provider == "reference":
                return provider
            reason = self._objection(provider, rival, build)
            if not reason:
                return provider
            providers.withdraw(provider, reason)

    def _objection(
        self, provider: AttentionProvider, rival: AttentionProvider, build: AttentionBuild
    ) -> str:
        """Why ``rival`` has to take the place of ``provider``; empty if it need not."""
        if self.bound.attention_providers.is_override(provider):
            # Bits must not hang on a clock, nor what was asked for by name.
            timed = not (self.config.deterministic or self.config.attention)
            with self.bound.runtime.inference_guard():
                reason = prove_attention(provider, rival, build, self.decisions, timed=timed)
            if reason:
                return reason
        allowed = self.bound.fuel.take(f"attention: {provider.name} by {provider.provider}")
        return "" if allowed else allowed.reason

    def _cell_bytes(self) -> int:
        itemsize = getattr(torch, self.plan.kv_dtype).itemsize
        return cell_bytes(self.spec.calls, itemsize=itemsize)

    def _make_pools(self, num_tokens: int) -> None:
        memory, runtime = self.bound.capabilities.memory, self.bound.runtime
        self.req_to_token_pool = ReqToTokenPool(
            self.plan.max_running_requests,
            self.plan.max_context_len,
            runtime.device,
            unified=memory.unified,
        )
        request = KVPoolRequest(
            runtime=runtime,
            calls=self.spec.calls,
            num_tokens=num_tokens,
            page_size=self.plan.page_size,
            dtype=getattr(torch, self.plan.kv_dtype),
        )
        slots = AllocatorRequest(
            num_tokens=num_tokens,
            page_size=self.plan.page_size,
            index_dtype=memory.index_dtype,
        )
        try:
            self.kv_pool = self.bound.make_kv_pool(request) or make_kv_pool(request)
        except (MemoryError, RuntimeError) as error:
            raise DeviceMemoryError(
                f"A cache of {num_tokens:,} tokens could not be allocated: {error}. Set "
                "--max-total-tokens or --mem-fraction lower",
                asked=num_tokens * self._cell_bytes(),
                free=runtime.memory().free_bytes,
            ) from error
        self.allocator = self.bound.make_allocator(slots) or make_allocator(slots)

    def _capture_sizes(self) -> tuple[int, ...]:
        """Up to the largest batch there can be; those that come first are captured first."""
        most, sizes = self.plan.max_running_requests, self.config.capture_sizes
        if sizes is not None:
            return capture_sizes(most, sizes=sizes)
        memory = memory_class(self.bound.runtime.memory().total_bytes)
        return capture_sizes(most, limit=most, memory=memory)

    def _rehearse(
        self, runner: GraphRunner, sizes: tuple[int, ...], prompts: PromptGraphs | None
    ) -> None:
        """Have the kernels of prompts and of buckets made ready, all at once."""
        rehearsal = self.bound.runtime.rehearsal()
        if rehearsal is None:
            return
        longest = self._longest_prompt()
        with rehearsal:
            runner.rehearse(sizes)
            if prompts is not None:
                prompts.rehearse()
            with self.bound.runtime.inference_guard():
                for count in sorted({min(count, longest) for count in _REHEARSED_TOKENS}):
                    for requests in _REHEARSED_REQUESTS:
                        # With a prefix: whole prompts may be another library's.
                        device = self.bound.runtime.device
                        self._eager(dummy_prompt(count, device, prefix=1, requests=requests))

    def _longest_prompt(self) -> int:
        """Most new tokens of a pass that no request of one more token refuses."""
        return min(self.plan.max_context_len - 1, self.config.chunked_prefill_tokens)

    def _capture_if_worth_it(self, graphs: GraphRunner, size: int) -> None:
        """Capture a bucket whose batches have long been padded to a larger one."""
        bucket = pad_to(size, graphs.request.capture_sizes)
        if bucket is None or bucket == graphs.bucket_of(graphs.resident(size)):
            return
        self._padded[bucket] += 1
        if self._padded[bucket] == _PADDED_STEPS:
            graphs.capture_next(size)

    def _make_decode_loop(self, largest: int) -> DecodeLoop | None:
        if not self.bound.capabilities.graph.sampling_inside:
            return None
        table = self.req_to_token_pool.req_to_token

        def make(ops: OpRegistry, table: Tensor, size: int) -> DecodeLoop:
            return DecodeLoop(
                self.bound.runtime,
                ops,
                table,
                max_batch_size=size,
                fill_len=self.attention.seq_len_fill_value,
                dtype=self.plan.dtype,
            )

        scratch = torch.zeros_like(table[:_TRIED_ROWS, :_TRIED_ROWS])
        prove_decode_loop(
            self.bound,
            self.decisions,
            partial(make, table=scratch, size=_TRIED_ROWS),
            vocab_size=self.spec.vocab_size,
            timed=not self.config.deterministic,
        )
        for asked in decode_requests(self.plan.dtype):
            self._ration(asked)
        return make(self.bound.ops, table, largest)

    def _ration(self, request: OpRequest) -> None:
        """Withdraw what there is no fuel for."""
        ops = self.bound.ops
        while (provider := ops.choose(request)).kind != "reference":
            allowed = self.bound.fuel.take(f"op.{request.op}: {provider.provider}")
            if allowed:
                return
            ops.withdraw(request, provider, allowed.reason)

    def _make_graph_runner(self, sizes: tuple[int, ...]) -> GraphRunner | None:
        memory = self.bound.capabilities.memory
        loop = self.decode_loop = self._make_decode_loop(sizes[-1])
        forward = self.model.forward
        runner: GraphRunner | None = self.bound.make_graph_runner(
            GraphRunnerRequest(
                runtime=self.bound.runtime,
                forward=forward if loop is None else loop.sampled(forward),
                begin=None if loop is None else loop.begin,
                attention=self.attention,
                capture_sizes=sizes,
                hidden_modes=(CaptureHiddenMode.NULL,),
                index_dtype=memory.index_dtype,
                record=self.decisions.record,
                progress=self._report("graphs"),
            )
        )
        return runner

    def _make_prompt_graphs(self, runner: GraphRunner) -> PromptGraphs | None:
        """``None`` where attention bakes lengths in, or nobody wants them."""
        longest, requests = self._longest_prompt(), self.plan.max_running_requests
        most = min(self.config.chunked_prefill_tokens, longest * min(requests, MOST_REQUESTS))
        sizes = self.config.capture_tokens
        if sizes is None:
            sizes = self._token_sizes
        if sizes is None:
            sizes = token_sizes(most)
        sizes = tuple(size for size in sizes if size <= most)
        if not sizes or not self.attention.extend_recordable:
            return None
        return PromptGraphs(
            runner,
            self.model.forward,
            sizes=sizes,
            max_requests=requests,
            longest=longest,
        )

    def _why_no_prompts(self) -> str:
        if not self.attention.extend_recordable:
            name = type(self.attention).__name__
            return f"{name} bakes the lengths of a pass into what it launches"
        if self._token_sizes == ():
            return "the device takes longer for a pass than the host for launching it"
        return "no size is asked for"

    def _report(self, what: str) -> Callable[[int, int], None] | None:
        progress = self._progress
        if progress is None:
            return None
        return lambda done, total: progress(what, done, total)
