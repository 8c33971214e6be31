# SPDX-License-Identifier: Apache-2.0
"""Operations, attention and the decision log."""

from __future__ import annotations

import json

import pytest

from bedplate.contract import (
    AttentionCallSpec,
    AttentionProvider,
    AttentionRequest,
    Candidate,
    Decision,
    OpProvider,
    OpRequest,
    Support,
)
from bedplate.errors import ContractError, UnsupportedError
from bedplate.registry.attention import AttentionProviders
from bedplate.registry.decisions import DecisionLog
from bedplate.registry.ops import Operations


@pytest.fixture
def log():
    return DecisionLog()


@pytest.fixture
def ops(log):
    return Operations({"norm": abs, "mul": abs}, log, "acme")


def provider(name, priority=100, supports=None, op="norm", **rest):
    extra = {"supports": supports} if supports else {}
    return OpProvider(op=op, provider=name, call=len, priority=priority, **extra, **rest)


def no(_request):
    return Support.no("too big")


def explode(_request):
    raise KeyError("x")


NORM = OpRequest(op="norm", dtype="float32", attributes={"order": "a"})


def verdicts(decision):
    return [(c.name, c.verdict, c.reason) for c in decision.candidates]


def test_priority_then_reference_last(ops, log):
    ops.register(provider("low", -50))
    ops.register(provider("refuser", 300, no))
    ops.register(provider("bomb", 400, explode))
    ops.register(provider("liar", 350, lambda _r: True))
    ops.register(provider("mute", 340, lambda _r: Support(False)))
    ops.register(provider("high", 200))
    assert ops.choose(NORM).provider == "high"
    (decision,) = log
    assert verdicts(decision) == [
        ("bomb", "failed", "supports() raised KeyError: 'x'"),
        ("liar", "failed", "supports() gave bool"),
        ("mute", "refused", "it gave no reason"),
        ("refuser", "refused", "too big"),
        ("high", "chosen", "'high' is the best that supports the request"),
        ("low", "possible", "'high' is the best that supports the request"),
        ("reference", "possible", "'high' is the best that supports the request"),
    ]
    assert decision.detail == {"dtype": "float32", "order": "a"}


def test_equal_requests_are_decided_once(ops, log):
    first = ops.choose(NORM)
    again = OpRequest(op="norm", dtype="float32", attributes={"order": "a"})
    assert ops.choose(again) is first
    ops.choose(OpRequest(op="norm", dtype="bfloat16"))
    assert log.points() == ("op.norm", "op.norm")
    assert not log.unexplained()


def test_unknown_operation(ops, log):  # HW060
    with pytest.raises(ContractError, match="Did you mean 'norm'"):
        ops.register(provider("x", op="nrm"))
    with pytest.raises(UnsupportedError) as caught:
        ops.choose(OpRequest(op="nrm", dtype="float32"))
    assert caught.value.code == "HW060"
    assert "mul, norm" in str(caught.value)
    assert [d.chosen for d in log] == [None]


def test_no_meaning_and_no_provider_lists_reasons(ops):  # HW060
    ops._providers["norm"] = [provider("a", supports=no), provider("b", supports=explode)]
    with pytest.raises(UnsupportedError) as caught:
        ops.choose(NORM)
    assert "a: too big; b: supports() raised KeyError" in str(caught.value)


@pytest.mark.parametrize("name", ["twice", "reference"])
def test_one_implementation_per_provider(ops, name):
    if name == "twice":
        ops.register(provider(name))
    with pytest.raises(ContractError, match="twice"):
        ops.register(provider(name))


def test_all_or_nothing(ops, log):
    attention = AttentionProviders(log, "acme")

    def half_a_pack():
        with ops.all_or_nothing(), attention.all_or_nothing():
            ops.register(provider("x"))
            attention.register(attention_of("x"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half_a_pack()
    assert ops.choose(NORM).provider == "reference"
    assert list(attention) == []


CALL = AttentionCallSpec(call_id=0, module="m", num_heads=1, num_kv_heads=1, head_dim=64,
                         value_dim=32, scale=1.0)  # fmt: skip
REQUEST = AttentionRequest(calls=(CALL,), dtype="float32", kv_dtype="float32", page_size=1)


def attention_of(name, priority=100, supports=lambda _r: Support.yes(), modes="all"):
    return AttentionProvider(
        name=name, provider="acme", priority=priority, supports=supports, build=len, modes=modes
    )


@pytest.fixture
def attention(log):
    providers = AttentionProviders(log, "acme")
    for item in (
        attention_of("slow", 10),
        attention_of("fast", 200),
        attention_of("picky", 300, no),
        attention_of("half", 400, modes="decode"),
    ):
        providers.register(item)  # fmt: skip
    return providers


@pytest.mark.parametrize(
    ("name", "mode", "chosen"),
    [(None, "all", "fast"), ("slow", "all", "slow"), (None, "decode", "half"),
     (None, "extend", "fast")],
)  # fmt: skip
def test_attention(attention, log, name, mode, chosen):
    assert attention.choose_attention(REQUEST, name, mode=mode).name == chosen
    (decision,) = log
    assert decision.point == ("attention" if mode == "all" else f"attention.{mode}")
    assert sorted(c.name for c in decision.candidates) == ["fast", "half", "picky", "slow"]
    assert decision.detail["head_sizes"] == "64/32"
    assert not log.unexplained()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("picky", ["picky: too big"]),
        ("half", ["half: serves decode only"]),
        ("fats", ["none of that name; known: slow, fast, picky, half", "did you mean 'fast'"]),
    ],
)
def test_named_attention_is_never_replaced(attention, log, name, words):  # HW060
    with pytest.raises(UnsupportedError) as caught:
        attention.choose_attention(REQUEST, name)
    assert caught.value.code == "HW060"
    assert all(word in str(caught.value) for word in words)
    assert [d.chosen for d in log] == [None]


def test_no_attention_at_all(log):  # HW060
    providers = AttentionProviders(log, "acme")
    with pytest.raises(UnsupportedError, match="no attention is registered"):
        providers.choose_attention(REQUEST)
    with pytest.raises(UnsupportedError, match="known: none"):
        providers.choose_attention(REQUEST, "x")


def test_attention_names_are_unique(attention):
    with pytest.raises(ContractError, match="registered already"):
        attention.register(attention_of("slow"))


def decision(point, chosen="a"):
    return Decision(
        point=point,
        chosen=chosen,
        candidates=(Candidate(name="a", verdict="chosen", reason="r"),),
    )


def test_unexplained_counts_both_ways(log):
    log.expect("a", "a", "b")
    log.record(decision("a"))
    log.record(decision("c"))
    gap = log.unexplained()
    assert (gap.missing, gap.unexpected) == (("a", "b"), ("c",))
    assert gap
    log.record(decision("a"))
    log.record(decision("b"))
    log.expect("c")
    assert not log.unexplained()
    assert len(log) == 4


def test_a_choice_that_breaks_off_stays_visible(log):
    with pytest.raises(ZeroDivisionError), log.choosing("backend"):
        raise ZeroDivisionError
    assert log.unexplained().missing == ("backend",)


def test_json_has_everything(log):
    log.record(decision("a"))
    assert json.loads(json.dumps(log.to_json())) == [
        {
            "point": "a", "chosen": "a", "detail": {},
            "candidates": [{"name": "a", "verdict": "chosen", "reason": "r"}],
        }
    ]  # fmt: skip


def test_late_observers_are_told_what_was_before(log):
    seen, calls = [], []

    def broken(item):
        calls.append(item)
        raise ValueError

    log.record(decision("a"))
    log.record(decision("b"))
    log.subscribe(lambda d: seen.append(d.point))
    log.subscribe(broken)
    log.record(decision("c"))
    assert seen == ["a", "b", "c"]
    assert len(calls) == 1
