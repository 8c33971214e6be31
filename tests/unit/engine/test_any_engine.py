# SPDX-License-Identifier: Apache-2.0
"""Engines of any shape give every request the tokens of its solo run, and come to an end."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bedplate.engine.core import EngineCore
from bedplate.memory.allocator import PagedAllocator
from bedplate.memory.req_to_token import ReqToTokenPool
from bedplate.runner.sampling_params import SamplingParams
from bedplate.scheduling.scheduler import Scheduler
from bedplate.testing.null_executor import HistoryExecutor

VOCAB, EOS = 12, 0


@dataclass(frozen=True)
class Asked:
    prompt: tuple[int, ...]
    most: int
    priority: int
    seed: int
    arrives: int
    leaves: int | None

    def solo(self):
        """What the history executor answers, written down once more."""
        history, new = list(self.prompt), []
        while len(new) < self.most and EOS not in new:
            data = np.array(history, np.int64).tobytes()
            new.append(zlib.crc32(data, self.seed) % VOCAB)
            history.append(new[-1])
        return tuple(new)


requests = st.builds(
    Asked,
    prompt=st.lists(st.integers(1, 3), min_size=1, max_size=20).map(tuple),
    most=st.integers(1, 12),
    priority=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
    arrives=st.integers(0, 12),
    leaves=st.none() | st.integers(0, 30),
)


@given(
    asked=st.lists(requests, min_size=1, max_size=10),
    page=st.sampled_from([1, 2, 4, 8]),
    spare_pages=st.integers(0, 6),
    spare_budget=st.integers(0, 20),
    rows=st.integers(1, 5),
    mixed=st.booleans(),
    overlap=st.booleans(),
    prefix_cache=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_engine(
    asked, page, spare_pages, spare_budget, rows, mixed, overlap, prefix_cache
):  # fmt: skip
    longest = max(len(one.prompt) + one.most for one in asked)
    pool = ReqToTokenPool(rows, longest)
    tokens = (-(-(longest - 1) // page) + spare_pages) * page
    allocator = PagedAllocator(tokens, page)
    scheduler = Scheduler(
        allocator=allocator,
        req_to_token_pool=pool,
        page_size=page,
        max_context_len=longest,
        max_running_requests=rows,
        max_prefill_tokens=page + spare_budget,
        mixed=mixed,
        overlap=overlap,
        prefix_cache=prefix_cache,
    )
    executor = HistoryExecutor(tokens + page, pool.table.shape, vocab_size=VOCAB)
    core = EngineCore(scheduler=scheduler, executor=executor, eos_token_ids=(EOS,))

    outputs = {}
    for step in range(2000):
        for index, one in enumerate(asked):
            if one.arrives == step:
                core.add_request(
                    one.prompt,
                    SamplingParams(max_tokens=one.most, seed=one.seed),
                    request_id=str(index),
                    priority=one.priority,
                )
            if one.leaves == step:
                core.abort(str(index))
        outputs |= {int(output.request_id): output for output in core.step().outputs}
        if len(outputs) == len(asked):
            break
    for index, one in enumerate(asked):
        output, alone = outputs[index], one.solo()
        if output.finish_reason == "abort":
            assert output.token_ids == alone[: len(output.token_ids)]
        else:
            assert output.token_ids == alone
    core.abort_all()
    held = scheduler.slots.cache.total_size if prefix_cache else 0
    assert allocator.available_size() + held == tokens
    assert scheduler.free_tokens == tokens
    assert pool.available_size == rows
