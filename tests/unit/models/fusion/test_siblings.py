# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from bedplate.contract import OpProvider
from bedplate.errors import ContractError
from bedplate.models.fusion.calls import observe
from bedplate.models.fusion.siblings import find_siblings


class Block(nn.Module):
    """Three linears of one input, and whatever a test wants to do with them."""

    def __init__(self, use=None, bias=(True, False, True)):
        super().__init__()
        self.q = nn.Linear(6, 4, bias=bias[0])
        self.k = nn.Linear(6, 2, bias=bias[1])
        self.v = nn.Linear(6, 2, bias=bias[2])
        self.out = nn.Linear(8, 6, bias=False)
        self.use = use or (lambda b, x: (b.q(x), b.k(x), b.v(x)))
        self.requires_grad_(False)

    def forward(self, x):
        return self.out(torch.cat(self.use(self, x), -1))


def sites_of(block, x=None):
    x = torch.randn(1, 3, 6) if x is None else x
    return find_siblings(observe(block, lambda module: module(x))[1])


class Counted:
    """``linear`` that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, weight, bias=None):
        self.calls += 1
        return functional.linear(x, weight, bias)


def fuse_one(block):
    (site,) = sites_of(block)
    linear = Counted()
    assert site.verify({"linear": OpProvider(op="linear", provider="k", call=linear)}).ok
    site.apply()
    linear.calls = 0
    return site, linear


@pytest.mark.parametrize("bias", [(True,) * 3, (False,) * 3, (True, False, True)])
@pytest.mark.parametrize("rows", [1, 5])
def test_one_product_instead_of_three_and_the_same_result(bias, rows):
    block = Block(bias=bias)
    x = torch.randn(1, rows, 6)
    want = block(x)
    site, linear = fuse_one(block)
    assert torch.allclose(block(x), want, rtol=1e-6, atol=1e-6)
    assert linear.calls == 1
    site.revert()
    assert torch.allclose(block(x), want, rtol=1e-6, atol=1e-6)
    assert linear.calls == 1
    assert not any("forward" in vars(part) for part in block.modules())


def test_the_request_and_path_say_what_is_merged():
    (site,) = sites_of(Block())
    assert site.path == "q+k+v"
    assert site.requests()[0].attributes == {"in": 6, "out": 8}
    assert site.requests()[0].dtype == "float32"


@given(order=st.permutations("qkv"), rows=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_the_order_of_calls_does_not_matter(order, rows):
    block = Block()
    fuse_one(block)
    x = torch.randn(1, rows, 6)
    for _ in range(2):
        for name in order:
            part = getattr(block, name)
            want = functional.linear(x, part.weight, part.bias)
            assert torch.allclose(part(x), want, atol=1e-6)


@given(
    st.lists(st.tuples(st.sampled_from("qkv"), st.integers(0, 2), st.booleans()), max_size=20)
)
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_calls_with_any_inputs_changed_in_between_is_right(steps):
    block = Block()
    fuse_one(block)
    inputs = [torch.randn(1, 2, 6) for _ in range(3)]
    for name, place, change in steps:
        x = inputs[place]
        if change:
            x.add_(1)
        part = getattr(block, name)
        want = functional.linear(x, part.weight, part.bias)
        assert torch.allclose(part(x), want, atol=1e-6)


def test_nothing_is_kept_after_all_members_were_called():
    block = Block()
    fuse_one(block)
    block(torch.randn(1, 2, 6))
    merged = vars(block.q)["forward"].func.__self__
    assert merged.x is None
    assert merged.result is None


def test_inference_mode_works():
    block = Block()
    x = torch.randn(1, 2, 6)
    want = block(x)
    _, linear = fuse_one(block)
    with torch.inference_mode():
        got = block(x + 0)
    assert torch.allclose(got, want, atol=1e-6)
    assert linear.calls == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda b, x: (b.q(x), b.k(x + 0), b.v(x * 1)),
        lambda b, x: (b.q(x), b.k(x.add_(1)), b.v(x.add_(1))),
        lambda b, x: (b.q(x), b.k(x), b.v(x), b.k(x + 1))[:3],
    ],
    ids=["other objects", "changed in place", "not always together"],
)
def test_linears_that_do_not_share_their_input_are_left_alone(use):
    assert sites_of(Block(use)) == []


def test_a_pair_is_enough_and_the_rest_stays():
    (site,) = sites_of(Block(lambda b, x: (b.q(x), b.k(x), b.v(x + 0))))
    assert site.path == "q+k"


def test_shared_weights_are_left_alone():
    block = Block(bias=(False,) * 3)
    block.v.weight = block.k.weight
    assert sites_of(block) == []


def test_a_weight_is_merged_into_one_group_only():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Block(), Block()
            self.b.q.weight = self.a.q.weight

        def forward(self, x):
            return self.b(self.a(x))

    assert [site.path for site in sites_of(Two())] == ["a.q+k+v"]


def test_subclasses_and_mixed_dtypes_are_left_alone():
    class Special(nn.Linear):
        pass

    block = Block()
    block.q = Special(6, 4)
    assert [site.path for site in sites_of(block)] == ["k+v"]
    block = Block(lambda b, x: (b.q(x), b.k(x), b.v(x.double()).float()))
    block.v.double()
    assert [site.path for site in sites_of(block)] == ["q+k"]


def test_a_wrong_kernel_is_refused_and_nothing_moves():
    block = Block()
    where = [p.data_ptr() for p in block.parameters()]
    (site,) = sites_of(block)

    def wrong(x, weight, bias=None):
        return functional.linear(x, weight, bias) * 1.001

    evidence = site.verify({"linear": OpProvider(op="linear", provider="k", call=wrong)})
    assert not evidence.ok
    assert "limit 1.0e-05" in evidence.text
    assert [p.data_ptr() for p in block.parameters()] == where


def test_a_site_is_not_applied_before_it_is_verified():
    block = Block()
    (site,) = sites_of(block)
    site.apply()
    assert "forward" not in vars(block.q)


class TestNamesAreKept:
    def test_weights_are_views_of_one_storage_and_the_same_objects(self):
        block = Block()
        before = {n: (p, p.clone()) for n, p in block.named_parameters()}
        fuse_one(block)
        storages = {getattr(block, n).weight.untyped_storage().data_ptr() for n in "qkv"}
        assert len(storages) == 1
        for name, parameter in block.named_parameters():
            assert parameter is before[name][0]
            assert torch.equal(parameter, before[name][1])

    def test_load_state_dict_reaches_the_merged_matrix(self):
        block, other = Block(), Block()
        fuse_one(block)
        where = [p.data_ptr() for p in block.parameters()]
        block.load_state_dict(other.state_dict())
        x = torch.randn(1, 2, 6)
        assert torch.allclose(block(x), other(x), atol=1e-6)
        assert [p.data_ptr() for p in block.parameters()] == where

    def test_state_dict_goes_into_a_plain_module(self):
        block, other = Block(), Block()
        fuse_one(block)
        other.load_state_dict(block.state_dict())
        x = torch.randn(1, 2, 6)
        assert torch.allclose(block(x), other(x), atol=1e-6)

    def test_ties_to_other_modules_are_kept(self):
        block = Block(bias=(False,) * 3)
        head = nn.Linear(6, 4, bias=False)
        head.weight = block.q.weight
        fuse_one(block)
        block.q.weight.fill_(3)
        assert head.weight is block.q.weight
        x = torch.ones(1, 1, 6)
        assert torch.equal(block.q(x), head(x))

    @pytest.mark.parametrize("copier", [copy.deepcopy, pickle.dumps])
    def test_copying_a_fused_module_is_refused_and_possible_after_revert(self, copier):
        block = Block(take)
        site, _ = fuse_one(block)
        with pytest.raises(ContractError, match=r"revert\(\)"):
            copier(block)
        site.revert()
        assert copier(block)


def take(block, x):
    return block.q(x), block.k(x), block.v(x)
