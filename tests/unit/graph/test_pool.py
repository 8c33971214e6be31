# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc

import torch

from bedplate.graph.pool import (
    get_global_graph_memory_pool,
    set_global_graph_memory_pool,
    shared_slot_buffers,
)
from bedplate.testing.graphs import CountingRuntime


def test_pool_handle_is_kept_per_runtime():
    first, second = CountingRuntime(), CountingRuntime()
    assert get_global_graph_memory_pool(first) is None
    set_global_graph_memory_pool(first, "handle")
    assert get_global_graph_memory_pool(first) == "handle"
    assert get_global_graph_memory_pool(second) is None


def test_buffers_live_as_long_as_someone_holds_them():
    runtime = CountingRuntime()
    key = ("ids", 4, torch.int64, torch.device("cpu"))
    buffer = torch.zeros(4, dtype=torch.int64)
    shared_slot_buffers(runtime)[key] = buffer
    assert shared_slot_buffers(runtime)[key] is buffer
    del buffer
    gc.collect()
    assert key not in shared_slot_buffers(runtime)


def test_two_runners_share_pool_and_slots_of_one_device(bench):
    first = bench().captured()
    second = bench(changes={"runtime": first.runtime}).captured()
    assert second.runner.pool is first.runner.pool
    assert first.seen[-1].input_ids.data_ptr() == second.seen[-1].input_ids.data_ptr()
    stranger = bench().captured()
    assert stranger.runner.pool is not first.runner.pool


def test_runners_that_share_slots_and_pool_take_turns(bench):
    first = bench().captured()
    second = bench(changes={"runtime": first.runtime}).captured()
    for turn, lengths in enumerate(([3, 4, 5], [9], [2, 2, 2, 2, 2])):
        for one in (first, second):
            batch = one.batch(lengths, seed=turn)
            expected = one.eager(batch).next_token_logits
            torch.testing.assert_close(one.replay(batch).next_token_logits, expected)
