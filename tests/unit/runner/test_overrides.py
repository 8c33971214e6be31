# SPDX-License-Identifier: Apache-2.0
"""Overrides of packs are tried on the model that runs, and give way if wrong or slower."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from bedplate import ModelRunner, demo
from bedplate.config import EngineConfig
from bedplate.contract import OpProvider, OpRequest, Support
from bedplate.errors import UnsupportedError
from bedplate.reference.attention import ReferenceAttention, reference_provider
from bedplate.reference.ops import OPERATIONS, PartialProduct, rms_norm
from bedplate.reference.runtime import TorchRuntime
from bedplate.registry import DecisionLog
from bedplate.registry.door import open_backend
from bedplate.runner import attention_overrides, overrides
from bedplate.runner.decode_loop import DecodeLoop
from bedplate.runner.proof import copied, gap_between, seconds_per_call, tensors_of


@pytest.fixture
def start(monkeypatch):
    """Loads the demo model on the processor with packs of one operation."""
    monkeypatch.setenv("BEDPLATE_PLUGINS", "none")
    bounds = []

    def go(*calls, offers=(), until="load_model", **settings):
        config = EngineConfig(
            model=str(demo.path()), backend="cpu", dtype="float32", max_context_len=96,
            max_running_requests=4, max_total_tokens=512, **settings,
        )  # fmt: skip
        log = DecisionLog()
        bound = open_backend(config=config, reference_ops=OPERATIONS, decisions=log)
        bounds.append(bound)
        bound.attention_providers.register(reference_provider)
        for place, call in enumerate(calls):
            bound.ops.register(
                OpProvider(
                    op="rms_norm", provider=f"pack{place}", call=call, kind="kernels",
                    priority=300 - place,
                )
            )  # fmt: skip
        for provider in offers:
            bound.attention_providers.register(provider, override=True)
        runner = ModelRunner(bound.config, bound, log)
        for name, stage in runner.stages():
            stage()
            if name == until:
                break
        assert not log.unexplained()
        return runner, log

    yield go
    for bound in bounds:
        bound.shutdown()


@pytest.fixture
def clock(monkeypatch):
    """Sets what overrides and what they replace seem to take."""

    def go(mine, theirs):
        for module in (overrides, attention_overrides):
            monkeypatch.setattr(
                module, "seconds_per_call", lambda _r, calls: [mine, theirs][: len(calls)]
            )

    return go


def right(x, weight, eps, order):
    return rms_norm(x, weight, eps, order)


def wrong(x, weight, eps, order):
    return rms_norm(x, weight, eps, order) * 1.01


def wrong_when_long(x, weight, eps, order):
    out = rms_norm(x, weight, eps, order)
    return out if x.shape[-2] < 64 else out.roll(1, dims=-2)


def spoils_its_input(x, weight, eps, order):
    out = rms_norm(x, weight, eps, order)
    x.add_(1.0)
    return out


def raises(x, weight, eps, order):
    raise RuntimeError("no such device function")


def verdicts(log, point):
    return [(d.chosen, d.candidates[0].verdict, d.candidates[0].reason)
            for d in log if d.point == point]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "words"),
    [(wrong, "wrong on"), (wrong_when_long, "wrong on 1x64x256"),
     (spoils_its_input, "wrong on"), (raises, "it raised RuntimeError: no such device")],
)  # fmt: skip
def test_a_wrong_override_gives_its_place_back(start, clock, call, words):
    clock(1.0, 9.0)
    _, log = start(call)
    (trial,) = [d for d in log if d.point == "override.rms_norm" and d.detail["size"] == "256"]
    assert (trial.chosen, trial.candidates[0].verdict) == ("cpu", "failed")
    assert words in trial.candidates[0].reason
    last = [d for d in log if d.point == "op.rms_norm" and d.detail["size"] == "256"][-1]
    assert last.chosen == "cpu"
    assert words in last.candidates[0].reason
    fused = [d for d in log if d.point.endswith("layers.0.input_layernorm.norm")]
    assert [d.chosen for d in fused] == ["fused"]
    assert "by cpu" in fused[0].candidates[0].reason


@pytest.mark.parametrize(
    ("mine", "theirs", "chosen"),
    [(1.0, 2.0, "pack0"), (1.05, 1.0, "pack0"), (1.2, 1.0, "cpu")],
)
def test_a_slower_override_gives_its_place_back(start, clock, mine, theirs, chosen):
    clock(mine, theirs)
    _, log = start(right)
    found = verdicts(log, "override.rms_norm")
    assert {name for name, _, _ in found} == {chosen}
    assert all(f"{theirs / mine:.2f} times the speed of cpu" in text for _, _, text in found)
    assert all("µs" in d.detail["1x64x256"] for d in log
               if d.point == "override.rms_norm" and d.detail["size"] == "256")  # fmt: skip


def test_time_is_real_where_nothing_pretends(start):
    def sleeps(x, weight, eps, order):
        time.sleep(0.002)
        return rms_norm(x, weight, eps, order)

    _, log = start(sleeps)
    assert {verdict for _, verdict, _ in verdicts(log, "override.rms_norm")} == {"refused"}


def test_the_next_override_is_tried_in_turn(start, clock):
    clock(1.0, 9.0)
    _, log = start(wrong, right)
    # Two sizes, each first by the one and then by the other.
    found = [d.candidates[0] for d in log if d.point == "override.rms_norm"]
    assert [(c.name, c.verdict) for c in found] == [
        ("pack0", "failed"), ("pack0", "failed"), ("pack1", "chosen"), ("pack1", "chosen"),
    ]  # fmt: skip


def test_bits_do_not_hang_on_a_clock(start, clock):
    clock(9.0, 1.0)
    runner, _ = start()
    request = OpRequest(op="rms_norm", dtype="float32", attributes={"order": "no_weight"})
    provider = OpProvider(op="rms_norm", provider="pack", call=right, kind="kernels")
    use = overrides.Use(request, provider, lambda _x: False)
    use.examples[((3, 8),)] = ((torch.randn(3, 8), None, 1e-6, "no_weight"), {})
    log = DecisionLog()
    assert overrides._settle(use, runner.bound, log, timed=False)
    assert not overrides._settle(use, runner.bound, log, timed=True)
    assert [reason for _, _, reason in verdicts(log, "override.rms_norm")] == [
        "agrees with the reference", "slower: 0.11 times the speed of cpu",
    ]  # fmt: skip


def test_without_packs_nothing_is_tried(start, monkeypatch):
    monkeypatch.setattr(overrides, "fuse", None)
    _, log = start()
    assert verdicts(log, "override.rms_norm") == []


class Right(ReferenceAttention):
    """As the reference."""


class ForgetsTheLast(ReferenceAttention):
    def forward_decode(self, q, k, v, call, batch, *, sinks=None):
        out = super().forward_decode(q, k, v, call, batch, sinks=sinks)
        return out.flip(0) if len(out) > 1 else out


class StoresNothing(ReferenceAttention):
    def forward_extend(self, q, k, v, call, batch, *, sinks=None):
        before = self._pool.key(call.cache_id).clone()
        out = super().forward_extend(q, k, v, call, batch, sinks=sinks)
        self._pool.key(call.cache_id).copy_(before)
        return out


class Breaks(ReferenceAttention):
    def prepare(self, batch):
        raise RuntimeError("no driver")


def offered(build, name="mine"):
    return replace(
        reference_provider, name=name, provider="pack", priority=500, build=build,
        supports=lambda _request: Support.yes(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "words"),
    [(ForgetsTheLast, "decode: differs"), (StoresNothing, "prefill: differs"),
     (Breaks, "it raised RuntimeError: no driver")],
)  # fmt: skip
def test_wrong_attention_gives_its_place_back(start, clock, build, words):
    clock(1.0, 9.0)
    runner, log = start(offers=[offered(build)], until="init_attention_backend")
    ((chosen, verdict, reason),) = verdicts(log, "override.attention")
    assert (verdict, words in reason) == ("failed", True), reason
    assert chosen == [d for d in log if d.point == "attention"][-1].chosen != "mine"
    assert not isinstance(runner.attention, build)
    assert not runner.req_to_token_pool.req_to_token.any()


@pytest.mark.parametrize(("mine", "kept"), [(0.5, True), (2.0, False)])
def test_slower_attention_gives_its_place_back(start, clock, mine, kept):
    clock(mine, 1.0)
    runner, log = start(offers=[offered(Right)], until="init_attention_backend")
    assert isinstance(runner.attention, Right) == kept
    ((_, verdict, reason),) = verdicts(log, "override.attention")
    assert verdict == ("chosen" if kept else "refused")
    assert f"{1 / mine:.2f} times the speed" in reason


def test_attention_asked_for_by_name_is_not_timed_but_must_be_right(start, clock):
    clock(9.0, 1.0)
    stage = "init_attention_backend"
    runner, _ = start(offers=[offered(Right)], until=stage, attention="mine")
    assert isinstance(runner.attention, Right)
    with pytest.raises(UnsupportedError, match=r"mine: wrong on .* decode"):
        start(offers=[offered(ForgetsTheLast)], until=stage, attention="mine")


def test_copies_share_nothing_but_weights_and_keep_strides():
    weight, x = torch.randn(4), torch.randn(6, 4)[:, :3]
    parts = PartialProduct(parts=torch.ones(2, 3), bias=None, dtype=torch.bfloat16)
    nest = ((x, weight, 1.5), {"parts": parts})
    own = copied(nest, lambda t: t is weight)
    assert own[0][1] is weight
    assert own[0][0].stride() == x.stride()
    assert torch.equal(own[0][0], x)
    assert own[0][0].data_ptr() != x.data_ptr()
    own[1]["parts"].parts.zero_()
    assert [t.dtype for t in tensors_of(nest)][-1] == torch.bfloat16
    assert float(list(tensors_of(nest))[-1].sum()) == 6.0


@pytest.mark.parametrize(
    ("got", "want", "ok"),
    [(torch.ones(3), torch.ones(3), True), (torch.ones(3) + 1e-4, torch.ones(3), False),
     (torch.ones(3), torch.ones(4), False), (torch.tensor([1]), torch.tensor([2]), False),
     (torch.tensor([2]), torch.tensor([2]), True), ((), torch.ones(1), False),
     (torch.full((2,), torch.nan), torch.ones(2), False), (torch.ones(0), torch.ones(0), True)],
)  # fmt: skip
def test_gaps(got, want, ok):
    assert gap_between(got, want).ok == ok


def test_the_quicker_of_two_is_seen():
    slow, quick = seconds_per_call(
        TorchRuntime("cpu"), [lambda: time.sleep(0.002), lambda: time.sleep(0.0005)]
    )
    assert 0.0005 <= quick < slow


def spoils_a_row(changes, rows, table, last_tokens, fill_len):
    OPERATIONS["advance_decode"](changes, rows, table, last_tokens, fill_len)
    rows.positions[2] += 1


def forgets_to_keep(logits, rows, seq_lens, tables, last_tokens):
    return OPERATIONS["sample_tokens"](logits, rows, seq_lens, tables, last_tokens.clone())


@pytest.mark.parametrize(
    ("op", "call", "verdict"),
    [("advance_decode", spoils_a_row, "failed"), ("sample_tokens", forgets_to_keep, "failed"),
     ("advance_decode", OPERATIONS["advance_decode"], "chosen"),
     ("sample_tokens", OPERATIONS["sample_tokens"], "chosen")],
)  # fmt: skip
def test_what_stands_around_a_recorded_pass_is_tried_too(start, clock, op, call, verdict):
    clock(1.0, 1.0)
    runner, _ = start()
    log, bound = DecisionLog(), runner.bound
    bound.ops.register(OpProvider(op=op, provider="pack", call=call, kind="kernels"))

    def make(ops):
        table = torch.zeros(17, 17, dtype=torch.int32)
        return DecodeLoop(
            bound.runtime, ops, table, max_batch_size=16, fill_len=1, dtype="float32"
        )

    overrides.prove_decode_loop(bound, log, make, vocab_size=100)
    assert [v for _, v, _ in verdicts(log, f"override.{op}")] == [verdict]


def test_writing_to_the_cache_is_tried_too(start, clock):
    def writes_nothing(q, k, v, positions, rope, norm, keys=None, values=None, slots=None):
        OPERATIONS["qk_norm_rope_write"](q, k, v, positions, rope, norm)

    clock(1.0, 1.0)
    runner, _ = start()
    request = OpRequest(op="qk_norm_rope_write", dtype="float32")
    provider = OpProvider(op=request.op, provider="pack", call=writes_nothing, kind="kernels")
    use = overrides.Use(request, provider, lambda _x: False)
    heads = [torch.randn(3, count, 8) for count in (4, 2, 2)]
    use.examples[((3, 4, 8),)] = ((*heads, torch.arange(3), None, None), {})
    assert overrides._judge(use, provider, runner.bound.runtime, timed=False)[0] == "chosen"
    overrides._add_cache(use)
    assert overrides._judge(use, provider, runner.bound.runtime, timed=False)[0] == "failed"


def test_what_a_rehearsal_is_called_with_is_not_kept(start, clock):
    @contextmanager
    def rehearsal():
        rehearsed.append(True)
        yield

    rehearsed = []
    clock(1.0, 1.0)
    runner, _ = start()
    runner.bound.ops.register(
        OpProvider(op="rms_norm", provider="pack", call=right, kind="kernels", priority=900)
    )
    witness = overrides.Witness(runner.bound.ops, lambda _x: False)
    request = OpRequest(op="rms_norm", dtype="float32", attributes={"order": "no_weight"})
    call = witness.choose(request).call
    with witness.looking_away(rehearsal()):
        call(torch.randn(2, 8), None, 1e-6, "no_weight")
    call(torch.randn(3, 8), None, 1e-6, "no_weight")
    (use,) = witness.uses.values()
    assert rehearsed
    assert list(use.examples) == [((3, 8),)]
