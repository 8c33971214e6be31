# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from bedplate.errors import ConfigError, UnsupportedError
from bedplate.models.fusion import fuse as fuse_any
from bedplate.models.fusion.calls import trial_forward
from bedplate.models.fusion.plan import _samples
from bedplate.models.fusion.site import difference
from bedplate.models.weights import (
    WeightIndex,
    load_model,
    save_pretrained,
    save_sharded_model,
    update_weights_from_disk,
)
from bedplate.reference.ops import rms_norm
from bedplate.testing.tiny_models import FAMILIES, family, tiny_model

fuse = partial(fuse_any, mode="leaf")
"""Blocks have tests of their own."""

IDS = torch.arange(3, 20)[None]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.fixture
def qwen3():
    return tiny_model(*family("qwen3"))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_no_family_changes_its_answer(name, ops):
    model = tiny_model(*family(name))
    want = logits(model)
    plan = fuse(model, ops(rms_norm=rms_norm))
    assert difference(logits(model), want) <= 1e-5
    assert {c.verdict for d in plan.decisions for c in d.candidates} <= {"chosen", "possible"}
    plan.revert()
    assert not any("forward" in vars(part) for part in model.modules())
    assert difference(logits(model), want) <= 1e-6
    plan.apply()
    assert difference(logits(model), want) <= 1e-5


@pytest.mark.parametrize(
    ("name", "siblings", "norm", "linear"),
    [
        ("llama", 8, 9, 9),
        ("qwen3", 8, 17, 9),
        ("gemma2", 8, 17, 9),
        ("deepseek_v3", 8, 17, 17),
        ("gpt2", 0, 0, 1),
    ],
)
def test_what_is_found(name, siblings, norm, linear, ops):
    plan = fuse(tiny_model(*family(name)), ops(rms_norm=rms_norm))
    found = [plan.counts().get(pattern, 0) for pattern in ("siblings", "norm", "linear")]
    assert found == [siblings, norm, linear]
    assert len(plan.decisions) == 1 + siblings + norm + linear


def test_bfloat16_norms_keep_every_bit(ops):
    model = tiny_model(*family("qwen3"), dtype=torch.bfloat16)
    with_norms = fuse(model, ops(rms_norm=rms_norm))
    a = logits(model)
    with_norms.revert()
    fuse(model, ops())
    assert with_norms.counts()["norm"] == 17
    assert torch.equal(logits(model), a)


def test_each_decision_names_its_place_and_its_numbers(qwen3, ops):
    plan = fuse(qwen3, ops())
    points = [decision.point for decision in plan.decisions]
    assert len(set(points)) == len(points)
    assert points[0] == "fusion"
    by_point = {d.point: d for d in plan.decisions}
    merged = by_point["fusion.model.layers.0.self_attn.q_proj+k_proj+v_proj.siblings"]
    assert merged.chosen == "fused"
    assert "limit 1.0e-05" in merged.candidates[0].reason


def test_a_norm_is_left_alone_where_only_the_reference_has_it(qwen3, ops):
    plan = fuse(qwen3, ops())
    norm = {d.point: d for d in plan.decisions}["fusion.model.norm.norm"]
    assert norm.chosen == "original"
    assert norm.candidates[0].verdict == "refused"
    assert norm.candidates[1].verdict == "chosen"
    assert "norm" not in plan.counts()


@pytest.mark.parametrize(("dtype", "chosen"), [("float32", "original"), ("bfloat16", "fused")])
def test_plain_torch_merges_only_where_it_was_measured_to_gain(ops, dtype, chosen):
    model = tiny_model(*family("llama"), dtype=getattr(torch, dtype))
    plan = fuse(model, ops(linear=None))
    siblings = [d for d in plan.decisions if d.point.endswith("siblings")]
    assert [d.chosen for d in siblings] == [chosen] * 8
    assert all("product" in d.candidates[0].reason for d in siblings)


def test_off_touches_nothing(qwen3, ops):
    plan = fuse(qwen3, ops(), mode="off")
    assert [d.chosen for d in plan.decisions] == ["off"]
    assert plan.counts() == {}
    assert not any("forward" in vars(part) for part in qwen3.modules())


def test_an_unknown_mode_names_the_known(qwen3, ops):
    with pytest.raises(ConfigError, match="off, leaf, block"):
        fuse(qwen3, ops(), mode="whole")


def test_a_model_that_cannot_run_alone_stays_as_it_is(qwen3, ops):
    def run(_module):
        raise RuntimeError("no step context")

    plan = fuse(qwen3, ops(), run=run)
    assert plan.sites == ()
    assert plan.decisions[0].chosen == "off"
    assert "no step context" in plan.decisions[0].candidates[0].reason


def wrong_linear(x, weight, bias=None):
    return functional.linear(x, weight, bias) + 0.01


def raising_linear(x, weight, bias=None):
    raise RuntimeError("no such kernel image")


@pytest.mark.parametrize(
    ("linear", "word"), [(wrong_linear, "limit"), (raising_linear, "no such kernel image")]
)
def test_a_site_that_fails_its_numbers_stays_with_the_numbers(qwen3, ops, linear, word):
    want = logits(qwen3)
    plan = fuse(qwen3, ops(linear=linear))
    assert plan.counts() == {}
    failed = [d for d in plan.decisions if d.point.endswith("siblings")]
    assert {d.candidates[0].verdict for d in failed} == {"failed"}
    assert all(word in d.candidates[0].reason for d in failed)
    assert torch.equal(logits(qwen3), want)


def test_no_provider_is_a_refusal_with_its_reason(qwen3, ops, monkeypatch):
    registry = ops()

    def choose(_request):
        raise UnsupportedError("nobody multiplies")

    monkeypatch.setattr(registry, "choose", choose)
    plan = fuse(qwen3, registry)
    assert plan.sites == ()
    assert {d.candidates[0].reason for d in plan.decisions[1:]} == {"nobody multiplies"}


@pytest.mark.parametrize("how", ["wrong", "raises"])
def test_a_kernel_that_is_right_alone_but_not_in_the_model_is_taken_back(qwen3, ops, how):
    """Right on the rows that it is verified with; wrong for what the model gives it."""
    want = logits(qwen3)
    inside = []

    def run(module):
        inside.append(module)
        try:
            return trial_forward(module)
        finally:
            inside.clear()

    def sly(x, weight, bias=None):
        if inside and how == "raises":
            raise RuntimeError("view of a non-contiguous tensor")
        return functional.linear(x, weight, bias) * (2 if inside else 1)

    plan = fuse(qwen3, ops(linear=sly), run=run)
    assert plan.counts().get("siblings", 0) == 0
    reasons = {d.candidates[0].reason for d in plan.decisions if d.point.endswith("siblings")}
    assert any("logits differ" in r or "the model raised" in r for r in reasons)
    assert difference(logits(qwen3), want) <= 1e-6


class TestWeightsOfAFusedModel:
    @pytest.fixture
    def fused(self, tmp_path, ops):
        self.model = tiny_model(*family("qwen3"))
        self.model.save_pretrained(tmp_path / "first")
        loaded = load_model(tmp_path / "first")
        self.plan = fuse(loaded.module, ops())
        assert self.plan.counts() == {"siblings": 8, "linear": 9}
        return loaded

    def test_the_index_still_sees_every_tensor(self, fused):
        assert all(
            torch.equal(fused.index.get(name), tensor)
            for name, tensor in self.model.state_dict().items()
        )

    def test_an_update_reaches_the_merged_matrices_and_moves_nothing(self, fused, tmp_path):
        other = tiny_model(*family("qwen3"), seed=5)
        other.save_pretrained(tmp_path / "second")
        where = [p.data_ptr() for p in fused.module.parameters()]
        assert update_weights_from_disk(fused.index, tmp_path / "second")
        assert [p.data_ptr() for p in fused.module.parameters()] == where
        assert difference(logits(fused.module), logits(other)) <= 1e-5

    def test_a_refused_update_changes_no_bit(self, fused):
        before = logits(fused.module)
        weight = "model.layers.0.self_attn.q_proj.weight"
        assert not index_update(fused.index, {weight: torch.zeros(64, 64), "x": torch.ones(1)})
        assert torch.equal(logits(fused.module), before)

    def test_save_pretrained_writes_the_same_file_without_growth(self, fused, tmp_path):
        save_pretrained(fused.index, tmp_path / "again")
        first, again = (tmp_path / n / "model.safetensors" for n in ("first", "again"))
        a, b = load_file(first), load_file(again)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n], b[n]) for n in a)
        assert abs(again.stat().st_size - first.stat().st_size) < 1024

    def test_the_modules_own_save_pretrained_works_too(self, fused, tmp_path):
        fused.module.save_pretrained(tmp_path / "again")
        again = (tmp_path / "again" / "model.safetensors").stat().st_size
        assert abs(again - (tmp_path / "first" / "model.safetensors").stat().st_size) < 1024

    def test_shards_hold_views_once(self, fused, tmp_path):
        (file,) = save_sharded_model(fused.index, tmp_path / "shards")
        saved = load_file(file)
        assert sum(t.nbytes for t in saved.values()) == sum(
            p.nbytes for p in fused.module.parameters()
        )
        assert file.stat().st_size < sum(t.nbytes for t in saved.values()) + 16_384

    def test_an_index_made_after_fusion_is_as_good(self, fused):
        index = WeightIndex(fused.module)
        assert index.names() == fused.index.names()


def index_update(index, tensors):
    from bedplate.models.weights import update_weights_from_tensor

    return update_weights_from_tensor(index, tensors)


def test_of_sites_that_are_alike_the_first_and_the_last_are_rehearsed():
    """A layer costs a rehearsal as much as a pass, and its kernels are those of the others."""
    paths = [f"layers.{n}.{part}" for n in range(4) for part in ("norm", "mlp")] + ["norm"]
    sites = [SimpleNamespace(pattern=path[-4:], path=path) for path in paths]
    sites.append(SimpleNamespace(pattern="layer", path="layers.2.mlp"))
    chosen = [(site.pattern, site.path) for site in _samples(sites)]
    assert chosen == [
        ("norm", "layers.0.norm"), (".mlp", "layers.0.mlp"),
        ("norm", "layers.3.norm"), (".mlp", "layers.3.mlp"),
        ("norm", "norm"), ("layer", "layers.2.mlp"),
    ]  # fmt: skip
