# SPDX-License-Identifier: Apache-2.0
"""Every "auto" is resolved with a decision, or refused with the allowed values."""

from __future__ import annotations

import pytest

from bedplate.config import EngineConfig
from bedplate.contract import BackendCapabilities, GraphCapabilities, MemoryCapabilities
from bedplate.errors import ConfigError, DeviceMemoryError
from bedplate.runner.plan import ModelFacts, resolve_plan
from bedplate.runner.pool_size import MemoryBudget, choose_pool_size

NATIVE_BF16 = BackendCapabilities(
    device_type="x", compute_dtypes=("bfloat16", "float32"), kv_dtypes=("float32", "bfloat16"),
    memory=MemoryCapabilities(page_sizes=(16, 1)),
)  # fmt: skip
NATIVE_FP32 = BackendCapabilities(
    device_type="x", compute_dtypes=("float32", "bfloat16"), kv_dtypes=("float32",)
)
BF16, FP32, FP16 = (
    ModelFacts(dtype=name, max_position_embeddings=4096)
    for name in ("bfloat16", "float32", "float16")
)


@pytest.mark.parametrize(
    ("asked", "capabilities", "model", "dtype"),
    [
        ("auto", NATIVE_BF16, BF16, "bfloat16"),
        ("auto", NATIVE_BF16, FP32, "float32"),  # exact weights stay exact
        ("auto", NATIVE_BF16, FP16, "bfloat16"),
        ("auto", NATIVE_FP32, BF16, "float32"),  # slower there, and float32 loses nothing
        ("auto", NATIVE_FP32, ModelFacts(dtype=None, max_position_embeddings=9), "float32"),
        ("bfloat16", NATIVE_FP32, FP32, "bfloat16"),
    ],
)
def test_dtype(asked, capabilities, model, dtype):
    plan = resolve_plan(EngineConfig(dtype=asked), capabilities, model)
    assert plan.dtype == dtype
    decision = next(d for d in plan.decisions if d.point == "dtype")
    assert decision.chosen == dtype
    assert all(candidate.reason for candidate in decision.candidates)


def test_every_field_has_exactly_one_decision():
    plan = resolve_plan(EngineConfig(), NATIVE_BF16, BF16)
    assert [d.point for d in plan.decisions] == [
        "dtype", "kv_dtype", "page_size", "max_context_len", "max_running_requests", "graph",
        "overlap",
    ]  # fmt: skip
    assert (plan.kv_dtype, plan.page_size, plan.max_context_len) == ("bfloat16", 16, 4096)
    assert (plan.graphs, plan.overlap) == (False, False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "float16"}, "bfloat16, float32"),
        ({"kv_dtype": "float16"}, "float32, bfloat16"),
        ({"page_size": 32}, "16, 1"),
        ({"max_context_len": 5000}, "4096"),
        ({"graphs": True}, "no graph runner"),
    ],
)
def test_what_cannot_be_met_is_refused_with_what_can(settings, said):
    with pytest.raises(ConfigError, match=said):
        resolve_plan(EngineConfig(**settings), NATIVE_BF16, BF16)


def test_a_very_long_context_must_be_asked_for():
    long = ModelFacts(dtype="bfloat16", max_position_embeddings=1 << 20)
    assert resolve_plan(EngineConfig(), NATIVE_BF16, long).max_context_len == 1 << 15
    asked = EngineConfig(max_context_len=1 << 20)
    assert resolve_plan(asked, NATIVE_BF16, long).max_context_len == 1 << 20


@pytest.mark.parametrize(
    ("graph", "asked", "on"),
    [
        (GraphCapabilities(supported=True, default=True), None, True),
        (GraphCapabilities(supported=True, default=True), False, False),
        (GraphCapabilities(supported=True, reason="slow"), None, False),
        (GraphCapabilities(supported=True, reason="slow"), True, True),
        (GraphCapabilities(), None, False),
    ],
)
def test_graphs(graph, asked, on):
    capabilities = BackendCapabilities(device_type="x", graph=graph)
    plan = resolve_plan(EngineConfig(graphs=asked), capabilities, FP32)
    assert plan.graphs is on


def test_overlap_follows_the_device():
    asynchronous = BackendCapabilities(
        device_type="x", memory=MemoryCapabilities(asynchronous=True)
    )
    assert resolve_plan(EngineConfig(), asynchronous, FP32).overlap
    assert not resolve_plan(EngineConfig(overlap=False), asynchronous, FP32).overlap


GIB = 1 << 30


def budget(**changes):
    numbers = {
        "free_before_load_bytes": 10 * GIB, "free_bytes": 6 * GIB, "graph_bytes": 0,
        "cell_bytes": 1 << 16, "unified": False, "mem_fraction": 0.9, **changes,
    }  # fmt: skip
    return MemoryBudget(**numbers)


@pytest.mark.parametrize(
    ("changes", "options", "tokens"),
    [
        ({}, {}, 5 * GIB >> 16),
        ({"graph_bytes": GIB}, {}, 4 * GIB >> 16),
        ({}, {"most_useful": 1000}, 992),
        ({}, {"asked": 100}, 96),
        ({}, {"asked": 3}, 16),  # never less than a page
        ({"unified": True}, {}, 4 * GIB >> 16),
        ({"unified": True}, {"asked": 5 * GIB >> 16}, 5 * GIB >> 16),
    ],
)
def test_pool_size(changes, options, tokens):
    given = {"most_useful": 1 << 40, "page_size": 16, "asked": None, **options}
    chosen, decision = choose_pool_size(budget(**changes), **given)
    assert chosen == tokens
    assert sum(c.verdict == "chosen" for c in decision.candidates) == 1


@pytest.mark.parametrize(
    ("changes", "asked"),
    [({"free_bytes": GIB}, None), ({"graph_bytes": 6 * GIB}, None), ({}, 1 << 20)],
)
def test_a_cache_that_cannot_fit_is_refused_with_the_numbers(changes, asked):
    with pytest.raises(DeviceMemoryError, match=r"GiB.*--mem-fraction") as caught:
        choose_pool_size(budget(**changes), most_useful=1 << 40, page_size=16, asked=asked)
    assert caught.value.facts["asked"] > 0
