# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from bedplate.contract import OpProvider
from bedplate.models.fusion.calls import observe
from bedplate.models.fusion.norm import find_norms, rounding_order
from bedplate.reference.ops import rms_norm


class FastNorm(nn.Module):
    """The float32-weight order, as torch's own function rounds."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class HalfNorm(nn.Module):
    """Rounds before the root, which is no known order."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (Qwen3RMSNorm, "weight_after_cast"),
        (Gemma3RMSNorm, "one_plus_weight_fp32"),
        (GptOssRMSNorm, "weight_fp32"),
        (FastNorm, "weight_fp32"),
        (lambda size, eps: Llama4TextL2Norm(eps), "no_weight"),
        (HalfNorm, None),
        (lambda size, eps: nn.LayerNorm(size, eps, bias=False), None),
    ],
)
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_the_rounding_order_is_recognised(make, order, eps):
    found = rounding_order(make(64, eps), 64)
    assert found == (None if order is None else (order, eps))


def test_a_module_that_wants_more_is_no_norm():
    class Gated(FastNorm):
        def forward(self, x, gate):
            return super().forward(x) * gate

    assert rounding_order(Gated(8, 1e-6), 8) is None


def test_the_weights_in_the_module_are_not_changed():
    norm = Qwen3RMSNorm(16)
    rounding_order(norm, 16)
    assert norm.weight.eq(1).all()


class Holder(nn.Module):
    def __init__(self, *norms):
        super().__init__()
        self.norms = nn.ModuleList(norms)

    def forward(self, x):
        for norm in self.norms:
            x = norm(x)
        return x


def sites_of(holder, x):
    return find_norms(observe(holder, lambda module: module(x))[1])


def test_each_norm_is_a_site_with_the_order_of_its_own_kind():
    holder = Holder(Qwen3RMSNorm(16), Gemma3RMSNorm(16), HalfNorm(16, 1e-6), nn.Linear(16, 16))
    sites = sites_of(holder, torch.randn(2, 16))
    assert [site.path for site in sites] == ["norms.0", "norms.1"]
    orders = [site.requests()[0].attributes["order"] for site in sites]
    assert orders == ["weight_after_cast", "one_plus_weight_fp32"]


def test_like_classes_with_other_settings_are_looked_at_apart():
    holder = Holder(Qwen3RMSNorm(16, eps=1e-6), Qwen3RMSNorm(16, eps=1e-2))
    sites = sites_of(holder, torch.randn(2, 16))
    assert [site.requests()[0].attributes["eps"] for site in sites] == [1e-6, 1e-2]


def test_a_norm_called_with_two_arguments_anywhere_is_left_alone():
    class Twice(Holder):
        def forward(self, x):
            return self.norms[0](self.norms[0](x), None)

    class Optional(FastNorm):
        def forward(self, x, gate=None):
            return super().forward(x)

    assert sites_of(Twice(Optional(16, 1e-6)), torch.randn(2, 16)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_exact_kernel_is_accepted_and_used(dtype):
    holder = Holder(Qwen3RMSNorm(16)).to(dtype)
    x = torch.randn(3, 16).to(dtype)
    (site,) = sites_of(holder, x)
    want, used = holder(x), []

    def kernel(x, weight, eps, order):
        used.append(order)
        return rms_norm(x, weight, eps, order)

    assert site.verify({"rms_norm": OpProvider(op="rms_norm", provider="k", call=kernel)}).ok
    site.apply()
    used.clear()
    assert torch.equal(holder(x), want)
    assert used == ["weight_after_cast"]
    site.revert()
    assert "forward" not in vars(holder.norms[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_with_another_rounding_order_is_refused(dtype):
    holder = Holder(Qwen3RMSNorm(64)).to(dtype)
    holder.norms[0].weight.data.normal_(1, 0.3)
    (site,) = sites_of(holder, torch.randn(3, 64).to(dtype))

    def kernel(x, weight, eps, order):
        return rms_norm(x, weight, eps, "weight_fp32")

    evidence = site.verify({"rms_norm": OpProvider(op="rms_norm", provider="k", call=kernel)})
    assert not evidence.ok
    assert "results differ, limit 0" in evidence.text


def test_a_kernel_of_another_shape_is_refused():
    (site,) = sites_of(Holder(Qwen3RMSNorm(8)).bfloat16(), torch.randn(3, 8).bfloat16())
    provider = OpProvider(op="rms_norm", provider="k", call=lambda x, weight, eps, order: x[0])
    assert not site.verify({"rms_norm": provider}).ok


def test_a_site_is_not_applied_before_it_is_verified():
    holder = Holder(Qwen3RMSNorm(8))
    (site,) = sites_of(holder, torch.randn(3, 8))
    site.apply()
    assert "forward" not in vars(holder.norms[0])
