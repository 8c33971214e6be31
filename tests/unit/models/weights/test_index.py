# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bedplate.errors import WeightsError
from bedplate.models.weights import Transform, WeightIndex


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.b = nn.Linear(4, 3, bias=False)
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.requires_grad_(False)


def pointers(module):
    return [t.data_ptr() for t in (*module.parameters(), *module.buffers())]


def test_names_are_parameters_and_persistent_buffers_in_order():
    assert WeightIndex(Small()).names() == ("scale", "a.weight", "a.bias", "b.weight")


def test_get_is_the_storage_itself():
    module = Small()
    index = WeightIndex(module)
    assert index.get("a.weight").data_ptr() == module.a.weight.data_ptr()


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(WeightsError, match=r"'a.wieght'.*a\.weight"):
        WeightIndex(Small()).get("a.wieght")
    with pytest.raises(WeightsError, match=r"'zzzzzz'\."):
        WeightIndex(Small()).get("zzzzzz")


@given(names=st.sets(st.sampled_from(["scale", "a.weight", "a.bias", "b.weight"])))
@settings(max_examples=20, deadline=None)
def test_any_part_is_updated_in_place_and_the_rest_untouched(names):
    module = Small()
    index = WeightIndex(module)
    before, where = {n: index.get(n).clone() for n in index.names()}, pointers(module)
    new = {n: torch.randn_like(before[n]) for n in names}
    assert set(index.update(new)) == names
    assert pointers(module) == where
    for name in index.names():
        assert torch.equal(index.get(name), new.get(name, before[name]))


BAD = {
    "unknown": {"c.weight": torch.ones(3, 4)},
    "misshapen": {"b.weight": torch.ones(4, 3)},
    "mistyped": {"b.weight": torch.ones(3, 4, dtype=torch.int32)},
    "eight bits without scales": {"b.weight": torch.ones(3, 4).to(torch.float8_e4m3fn)},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("exact", [True, False])
def test_one_bad_tensor_refuses_the_whole_set(bad, exact):
    module = Small()
    index = WeightIndex(module)
    before = {n: index.get(n).clone() for n in index.names()}
    with pytest.raises(WeightsError, match="Nothing was changed"):
        index.update({"a.weight": torch.zeros(3, 4), **bad}, exact=exact)
    assert all(torch.equal(index.get(n), before[n]) for n in before)


def test_floating_dtypes_are_cast():
    module = Small()
    WeightIndex(module).update({"a.bias": torch.tensor([1.5, 2.5, 3.5], dtype=torch.bfloat16)})
    assert torch.equal(module.a.bias, torch.tensor([1.5, 2.5, 3.5]))


def test_tensors_of_the_model_itself_can_be_swapped():
    module = Small()
    index = WeightIndex(module)
    a, b = module.a.weight.clone(), module.b.weight.clone()
    index.update({"a.weight": module.b.weight, "b.weight": module.a.weight})
    assert torch.equal(module.a.weight, b)
    assert torch.equal(module.b.weight, a)


def test_derived_tensors_are_refreshed_after_every_update():
    module = Small()
    index = WeightIndex(module)
    derived = torch.empty(3, 4)
    index.add_refresher(lambda: derived.copy_(module.b.weight + 1))
    index.update({"b.weight": torch.full((3, 4), 5.0)})
    assert derived.eq(6).all()


class Broken(RuntimeError):
    pass


def test_a_failing_refresher_brings_the_old_weights_back():
    module = Small()
    index = WeightIndex(module)
    before = {n: index.get(n).clone() for n in index.names()}
    derived = module.b.weight.clone()
    failures = [Broken("once")]

    def refresh():
        derived.copy_(module.b.weight)
        if failures:
            raise failures.pop()

    index.add_refresher(refresh)
    with pytest.raises(Broken):
        index.update({"b.weight": torch.zeros(3, 4), "a.bias": torch.zeros(3)})
    assert all(torch.equal(index.get(n), before[n]) for n in before)
    assert torch.equal(derived, before["b.weight"])


def test_a_refresher_that_always_fails_is_noted_on_the_first_error():
    index = WeightIndex(Small())

    def refresh():
        raise Broken

    index.add_refresher(refresh)
    with pytest.raises(Broken) as error:
        index.update({"a.bias": torch.zeros(3)})
    assert "old weights are back" in error.value.__notes__[0]


def test_an_interrupted_copy_brings_the_old_weights_back():
    module = Small()
    index = WeightIndex(module)
    before = {n: index.get(n).clone() for n in index.names()}

    def store(_view, _tensor):
        raise KeyboardInterrupt

    index.set_transform("b.weight", Transform(store=store, fetch=lambda view: view.clone()))
    with pytest.raises(KeyboardInterrupt):
        index.update({"a.weight": torch.zeros(3, 4), "b.weight": torch.zeros(3, 4)})
    assert torch.equal(module.a.weight, before["a.weight"])
    assert torch.equal(module.b.weight, before["b.weight"])


def test_a_tensor_may_be_stored_in_another_layout():
    module = nn.Module()
    module.w = nn.Parameter(torch.arange(6.0).view(2, 3).t().contiguous().view(2, 3), False)
    index = WeightIndex(module)
    index.set_transform(
        "w",
        Transform(
            store=lambda view, new: view.view(3, 2).copy_(new.t()),
            fetch=lambda view: view.view(3, 2).t().clone(),
        ),
    )
    assert torch.equal(index.get("w"), torch.arange(6.0).view(2, 3))
    new = torch.randn(2, 3)
    index.update({"w": new})
    assert torch.equal(index.get("w"), new)
    assert torch.equal(module.w, new.t().contiguous().view(2, 3))


class TestTied:
    def make(self):
        module = Small()
        module.b.weight = module.a.weight
        return module, WeightIndex(module)

    def test_either_name_updates_the_one_tensor(self):
        module, index = self.make()
        index.update({"b.weight": torch.full((3, 4), 2.0)})
        assert module.a.weight.eq(2).all()
        assert module.a.weight is module.b.weight
        assert index.canonical("b.weight") == "a.weight"

    def test_both_names_may_come_with_equal_values(self):
        module, index = self.make()
        new = torch.full((3, 4), 2.0)
        index.update({"a.weight": new, "b.weight": new.clone()})
        assert module.a.weight.eq(2).all()

    def test_both_names_with_unlike_values_are_refused(self):
        module, index = self.make()
        before = module.a.weight.clone()
        with pytest.raises(WeightsError, match=r"a.weight and b.weight") as error:
            index.update({"a.weight": torch.zeros(3, 4), "b.weight": torch.ones(3, 4)})
        assert error.value.facts["conflicts"] == (("a.weight", "b.weight"),)
        assert torch.equal(module.a.weight, before)


def test_extra_state_is_no_weight():
    class WithState(Small):
        def get_extra_state(self):
            return {"anything": 1}

        def set_extra_state(self, _state):
            pass

    assert "_extra_state" not in WeightIndex(WithState()).names()
