# SPDX-License-Identifier: Apache-2.0
"""Whole layers by operations: found by numbers, proven by numbers, taken back without trace."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from bedplate.batch.forward_mode import CaptureHiddenMode
from bedplate.contract import OpProvider
from bedplate.errors import InternalError
from bedplate.models.adapter import HFModel
from bedplate.models.fusion import fuse, glu
from bedplate.models.fusion.site import difference
from bedplate.models.fusion.trial import Trial
from bedplate.models.probe import probe
from bedplate.models.weights import WeightIndex, update_weights_from_tensor
from bedplate.reference import ops as reference
from bedplate.reference.ops import OPERATIONS, PartialProduct
from bedplate.reference.rope import qk_norm_rope_write
from bedplate.registry.decisions import DecisionLog
from bedplate.registry.ops import Operations
from bedplate.testing.tiny_models import FAMILIES, family, tiny_model

ATTENTION_ONLY = {"cohere2", "nemotron"}  # norms of their own stand around the attention
NO_BLOCK = {
    "ministral3", "llama4_text",  # queries grow with the position
    "gemma4_text",  # values are normed, and some layers read another's keys
    "gpt2", "opt",  # no plain linears; positions through a seam
    "deepseek_v2", "deepseek_v3", "minicpm3", "glm4_moe_lite", "longcat_flash",  # latent
}  # fmt: skip
MAX_POSITIONS = 256


class Bench:
    """A tiny model behind its bridge, and a registry in which a backend has every kernel."""

    def __init__(self, name, dtype=torch.float32, **replaced):
        model_class, config = family(name)
        spec = probe(model_class, config)
        self.module = tiny_model(model_class, config, dtype=dtype)
        self.model = HFModel(self.module, spec)
        self.trial = Trial(self.model, MAX_POSITIONS)
        self.calls = []
        self.ops = Operations(OPERATIONS, DecisionLog(), "test")
        for op, call in {**OPERATIONS, **replaced}.items():
            if call is not None:
                self.ops.register(OpProvider(op=op, provider="k", call=self.counted(op, call)))

    def counted(self, op, call):
        def run(*args, **kwargs):
            self.calls.append(op)
            return call(*args, **kwargs)

        return run

    def logits(self, tokens=8):
        with torch.no_grad():
            return self.trial.run(self.module, tokens)

    def fuse(self, mode="block"):
        self.plan = fuse(self.module, self.ops, mode=mode, trial=self.trial)
        return self.plan

    def shadowed(self):
        return any("forward" in vars(part) for part in self.module.modules())


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, dtype):
    bench = Bench(name, dtype)
    before = bench.logits(), bench.logits(1)
    counts = bench.fuse().counts()
    layers = bench.model.spec.num_layers
    found = counts.get("attention_block", 0), counts.get("layer", 0)
    want = (layers, layers)
    if name in ATTENTION_ONLY:
        want = (layers, 0)
    if name in NO_BLOCK:
        want = (0, 0)
    assert found == want
    failed = [d for d in bench.plan.decisions if d.candidates[0].verdict == "failed"]
    assert failed == []
    limit = 1e-5 if dtype == torch.float32 else 0.0  # bfloat16: the same roundings, each bit
    for tokens, logits in zip((8, 1), before, strict=True):
        assert difference(bench.logits(tokens), logits) <= limit
    bench.plan.revert()
    assert not bench.shadowed()
    assert difference(bench.logits(), before[0]) <= limit
    bench.plan.apply()
    assert difference(bench.logits(), before[0]) <= limit


def test_a_dense_layer_is_seven_operations():
    """With norms in the products; a sum and a norm that belong together are one."""
    bench = Bench("qwen3")
    bench.fuse()
    bench.calls.clear()
    bench.logits(1)
    layer = ["norm_linear", "qk_norm_rope_write", "linear", "norm_linear", "linear"]
    layers = bench.model.spec.num_layers
    assert bench.calls == layer * layers + ["add_norm", "linear"]


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("qwen3", "head norm weight_after_cast, half rotation"),
        ("olmo2", "flat norm"),
        ("glm4", "interleaved rotation"),
        ("smollm3", "no rotation"),
        ("gpt_neox", "half rotation"),
        ("granite", "factor 0.7"),
        ("gemma2", "in sequence, 4 norms"),
        ("phi", "parallel, 1 norms"),
        ("gpt_oss", "half rotation"),
    ],
)
def test_reasons_say_what_was_recognised(name, described):
    bench = Bench(name)
    reasons = [d.candidates[0].reason for d in bench.fuse().decisions]
    assert any(described in reason for reason in reasons)


def test_tables_hold_the_models_own_angles():
    bench = Bench("llama")
    bench.fuse()
    form = next(s for s in bench.plan.sites if s.pattern == "attention_block").form
    table = form._heads.rope
    positions = torch.arange(MAX_POSITIONS)[None]
    bench.plan.revert()
    cos, sin = bench.module.model.rotary_emb(torch.zeros(1, 1, 64), positions)
    half = cos.shape[-1] // 2
    assert torch.equal(table.cos, cos[0, :, :half])
    assert torch.equal(table.sin, sin[0, :, :half])


@pytest.mark.parametrize("mode", ["off", "leaf"])
def test_lower_tiers_leave_blocks_alone(mode):
    bench = Bench("qwen3")
    want = bench.logits()
    counts = bench.fuse(mode).counts()
    assert not {"attention_block", "glu", "layer", "rotary"} & counts.keys()
    assert difference(bench.logits(), want) <= 1e-5


def test_without_kernels_every_block_says_why_it_stays():
    bench = Bench("qwen3", qk_norm_rope_write=None, act_and_mul=None, add_norm=None)
    plan = bench.fuse()
    by_pattern = {}
    for decision in plan.decisions:
        by_pattern.setdefault(decision.point.rpartition(".")[2], decision)
    for pattern in ("attention_block", "glu", "layer", "final_norm", "rotary"):
        fused, original = by_pattern[pattern].candidates
        assert fused.verdict == "refused"
        assert fused.reason
        assert original.verdict == "chosen"


def wrong_turn(q, *rest, **more):
    qk_norm_rope_write(q, *rest, **more)
    q.mul_(1.01)


def wrong_add_norm(x, residual, *rest):
    normed, total = reference.add_norm(x, residual, *rest)
    return normed, total + 0.1


@pytest.mark.parametrize(
    ("op", "call", "lost"),
    [
        ("qk_norm_rope_write", wrong_turn, {"attention_block", "layer", "rotary"}),
        ("add_norm", wrong_add_norm, {"layer"}),  # the last norm has no use for the sum
        ("act_and_mul", lambda x, act: reference.act_and_mul(x, act) * 1.1, {"glu"}),
    ],
)
def test_a_wrong_kernel_costs_its_sites_and_nothing_else(op, call, lost):
    bench = Bench("qwen3", **{op: call})
    want = bench.logits()
    counts = bench.fuse().counts()
    blocks = {"glu", "attention_block", "rotary", "layer", "final_norm"}
    assert counts.keys() - {"siblings", "norm", "linear"} == blocks - lost
    assert difference(bench.logits(), want) <= 1e-5


def test_a_kernel_that_is_wrong_for_one_row_is_found():
    """What a decode pass runs is tried too, not only what a prompt runs."""

    def norm_linear(x, *rest, **more):
        out, total = reference.norm_linear(x, *rest, **more)
        return (out * 2 if x.shape[-2] == 1 else out), total

    bench = Bench("llama", norm_linear=norm_linear)
    want = bench.logits(1)
    assert "layer" not in bench.fuse().counts()
    assert difference(bench.logits(1), want) <= 1e-5


@pytest.mark.parametrize(
    ("name", "a_layer"),
    [
        ("qwen3", 2),  # both products of a layer go into the norm behind them
        ("gemma2", 1),  # the second one is normed, but whole
        ("olmo2", 1),
        ("granite", 0),  # multiplied by a factor before
        ("phi", 0),  # added to each other before
    ],
)
def test_products_are_left_in_parts_where_a_norm_adds_them(name, a_layer):
    def linear(x, weight, bias=None, finish=True):
        if finish:
            return reference.linear(x, weight, bias)
        unfinished.append(x)
        halves = zip(x.chunk(2, -1), weight.chunk(2, -1), strict=True)
        parts = torch.stack([reference.linear(*half).float() for half in halves])
        return PartialProduct(parts=parts, bias=bias, dtype=x.dtype)

    unfinished = []
    bench = Bench(name, linear=linear)
    want = bench.logits()
    assert bench.fuse().counts()["layer"] == bench.model.spec.num_layers
    unfinished.clear()
    assert difference(bench.logits(), want) <= 1e-5
    assert len(unfinished) == a_layer * bench.model.spec.num_layers


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "granite"])
def test_many_rows_go_through_a_block_in_slices(name, monkeypatch):
    """Between its products a block is several times as wide as a layer."""

    def act_and_mul(x, act):
        rows.append(x.numel() // x.shape[-1])
        return reference.act_and_mul(x, act)

    rows = []
    bench = Bench(name, act_and_mul=act_and_mul)
    want = bench.logits(), bench.logits(1)
    width = 2 * bench.module.config.intermediate_size
    monkeypatch.setattr(glu, "_WHOLE", 7 * width)
    monkeypatch.setattr(glu, "_SLICE", 3 * width)
    counts = bench.fuse().counts()
    layers = bench.model.spec.num_layers
    assert (counts["glu"], counts["layer"]) == (layers, layers)
    rows.clear()
    assert difference(bench.logits(), want[0]) <= 1e-5
    assert rows == [2] * 4 * layers  # seven of the eight fit; slices have a power of two
    rows.clear()
    assert difference(bench.logits(1), want[1]) <= 1e-5
    assert not rows  # the norm, the product and the gate are one operation


def test_a_block_in_slices_may_take_the_place_of_its_input(monkeypatch):
    bench = Bench("qwen3")
    monkeypatch.setattr(glu, "_WHOLE", 0)
    monkeypatch.setattr(glu, "_SLICE", 4 * bench.module.config.intermediate_size)
    bench.fuse()
    form = next(site.form for site in bench.plan.sites if site.pattern == "glu")
    x = torch.randn(1, 7, bench.module.config.hidden_size)
    want, place = form.run(x.clone()), x.data_ptr()
    got = form.run_over(x)
    assert torch.equal(got, want)
    assert got.data_ptr() == place
    apart = torch.randn(1, 7, 2 * x.shape[-1])[..., ::2]  # rows that are not adjacent stay
    before = apart.clone()
    assert torch.equal(form.run_over(apart), form.run(before))
    assert torch.equal(apart, before)


def test_updates_reach_the_merged_matrices():
    bench = Bench("qwen3")
    bench.fuse()
    other = tiny_model(*family("qwen3"), seed=5)
    result = update_weights_from_tensor(
        WeightIndex(bench.module), [*other.named_parameters()], "direct"
    )
    assert result
    fresh = Bench("qwen3")
    fresh.module.load_state_dict(other.state_dict())
    assert difference(bench.logits(), fresh.logits()) <= 1e-5


def test_a_residual_that_nobody_adds_is_an_error_and_not_an_answer():
    bench = Bench("llama")
    bench.fuse()
    final = next(site for site in bench.plan.sites if site.pattern == "final_norm")
    vars(final._call.module).pop("forward")
    with pytest.raises(InternalError, match="residual"):
        bench.logits()


def test_a_rehearsal_goes_through_everything_and_leaves_nothing():
    """Kernels that write nothing, as while they are compiled, decide nothing."""
    rehearsing = []

    class Rehearsal:
        def __enter__(self):
            rehearsing.append(True)

        def __exit__(self, *_):
            rehearsing.pop()

    def silent(op):
        def run(*args, **kwargs):
            out = OPERATIONS[op](*args, **kwargs)
            if rehearsing:
                seen.add(op)
                for tensor in out if isinstance(out, tuple) else (out,):
                    if tensor is not None:
                        tensor.fill_(float("nan"))
            return out

        return run

    seen = set()
    ops = ("linear", "norm_linear", "add_norm", "act_and_mul", "rms_norm")
    bench = Bench("qwen3", **{op: silent(op) for op in ops})
    want = bench.logits()
    plan = fuse(bench.module, bench.ops, trial=bench.trial, rehearsal=Rehearsal)
    assert seen == set(ops)
    assert plan.counts()["layer"] == bench.model.spec.num_layers
    assert difference(bench.logits(), want) <= 1e-5


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "olmo2"])
def test_the_last_layer_goes_on_with_the_wanted_tokens_alone(name):
    rows = []

    def add_norm(x, *rest):
        rows.append(x.shape[-2])
        return OPERATIONS["add_norm"](x, *rest)

    bench = Bench(name, add_norm=add_norm, norm_linear=None)
    whole = bench.logits()
    bench.fuse()
    rows.clear()
    with torch.no_grad():
        some = bench.trial.run(bench.module, rows=(6, 1))
    assert some.shape == (2, whole.shape[1])
    assert difference(some, whole[[6, 1]]) <= 1e-5
    assert rows[-1] == 2
    bench.plan.revert()
    with torch.no_grad():
        assert difference(bench.trial.run(bench.module, rows=(6, 1)), whole[[6, 1]]) <= 1e-5


def test_hidden_states_are_wanted_of_all_tokens():
    bench = Bench("qwen3")
    bench.fuse()
    batch = dataclasses.replace(
        bench.trial._batch(8),
        logits_rows=torch.tensor([3]),
        capture_hidden=CaptureHiddenMode.FULL,
    )
    bench.trial.run(bench.module)  # binds its attention
    with torch.no_grad():
        output = bench.model.forward(batch)
    assert output.hidden_states.shape[0] == 8
    assert output.next_token_logits.shape[0] == 1
