# SPDX-License-Identifier: Apache-2.0
"""What packs offer is marked as theirs, and can give its place back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bedplate.contract import AttentionRequest, OpProvider, OpRequest, Support
from bedplate.errors import UnsupportedError
from bedplate.reference.attention import reference_provider
from bedplate.registry.attention import AttentionProviders
from bedplate.registry.decisions import DecisionLog
from bedplate.registry.ops import Operations
from bedplate.registry.packs import register_packs

SMALL, LARGE = (OpRequest(op="norm", dtype="float32", attributes={"size": n}) for n in (8, 9))
PACK = """
@hookimpl
def bedplate_register_ops(self, registry):
    registry.register(OpProvider(op="norm", provider="mine", call=len, kind="backend"))
@hookimpl
def bedplate_register_attention(self, register):
    register(AttentionProvider(name="mine", provider="mine", priority=500, build=len,
                               supports=lambda request: Support.yes()))
"""


@pytest.fixture
def log():
    return DecisionLog()


@pytest.fixture
def ops(log):
    made = Operations({"norm": abs}, log, "acme")
    for name, priority in (("fast", 300), ("slow", 100)):
        made.register(OpProvider(op="norm", provider=name, call=len, priority=priority))
    return made


def test_one_use_loses_a_provider_and_others_keep_it(ops, log):
    fast = ops.choose(SMALL)
    assert ops.next_best(SMALL, fast).provider == "slow"
    ops.withdraw(SMALL, fast, "wrong")
    assert [ops.choose(r).provider for r in (SMALL, LARGE)] == ["slow", "fast"]
    again = [d for d in log if d.detail["size"] == "8"][-1]
    assert [(c.name, c.verdict, c.reason) for c in again.candidates[:2]] == [
        ("fast", "refused", "wrong"),
        ("slow", "chosen", "'slow' is the best that supports the request"),
    ]
    ops.withdraw(SMALL, ops.choose(SMALL), "slower")
    assert ops.choose(SMALL).provider == "reference"
    assert not log.unexplained()


def test_asking_for_the_next_best_records_nothing(ops, log):
    fast = ops.choose(SMALL)
    ops.next_best(SMALL, fast)
    assert len(log) == 1


def test_nothing_is_left_behind_the_reference(ops):
    with pytest.raises(UnsupportedError):
        Operations({}, DecisionLog(), "acme").next_best(SMALL, ops.choose(SMALL))


def test_attention_gives_its_place_back_too(log):
    providers = AttentionProviders(log, "acme")
    request = AttentionRequest(calls=(), dtype="float32", kv_dtype="float32", page_size=1)
    first, second = (
        replace(reference_provider, name=name, priority=priority)
        for name, priority in (("first", 9), ("second", 5))
    )
    providers.register(first, override=True)
    providers.register(second)
    assert [providers.is_override(p) for p in (first, second)] == [True, False]
    assert providers.next_best(request, first) is second
    providers.withdraw(first, "wrong")
    assert providers.choose_attention(request) is second
    with pytest.raises(UnsupportedError, match="first: wrong"):
        providers.choose_attention(request, "first")
    assert providers.next_best(request, second) is None


def test_the_door_marks_what_packs_offer_whatever_they_say(fakes, log, ops):
    fakes.plugin("mine", group="kernels", hooks=PACK)
    attention = AttentionProviders(log, "acme")
    register_packs(fakes.inspected(), "acme", ops, attention, log)
    assert ops.has_overrides
    (offered,) = attention
    assert attention.is_override(offered)
    ops.withdraw(SMALL, ops.choose(SMALL), "")
    assert {p.provider: p.kind for p in ops._providers["norm"]} == {
        "reference": "reference", "fast": "backend", "slow": "backend", "mine": "kernels",
    }  # fmt: skip


def test_a_pack_that_fails_leaves_no_mark(fakes, log, ops):
    fakes.plugin("mine", group="kernels", hooks=PACK + "    raise ValueError\n")
    attention = AttentionProviders(log, "acme")
    register_packs(fakes.inspected(), "acme", ops, attention, log)
    assert not ops.has_overrides
    provider = replace(reference_provider, name="mine", supports=lambda _r: Support.yes())
    attention.register(provider)
    assert not attention.is_override(provider)
