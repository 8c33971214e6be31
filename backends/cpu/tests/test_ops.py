# SPDX-License-Identifier: Apache-2.0
"""Every operation of the CPU backend is bit-equal to its meaning."""

from __future__ import annotations

import pytest
import torch

from bedplate.contract import OpProvider, OpRegistry, OpRequest
from bedplate.reference.ops import OPERATIONS, RMS_NORM_ORDERS
from bedplate_cpu import ops


class Collected(OpRegistry):
    def __init__(self):
        self.providers = {}

    def register(self, provider: OpProvider) -> None:
        self.providers[provider.op] = provider

    def choose(self, request: OpRequest) -> OpProvider:
        return self.providers[request.op]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", RMS_NORM_ORDERS)
@pytest.mark.parametrize("shape", [(1, 64), (7, 96), (2, 3, 128), (0, 64)], ids=str)
def test_norms_round_as_the_reference_does_or_say_no(order, shape, dtype):
    registry = Collected()
    ops.register(registry)
    provider = registry.providers["rms_norm"]
    request = OpRequest(op="rms_norm", dtype=str(dtype)[6:], attributes={"order": order})
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    weight = (
        None if order == "no_weight" else torch.randn(shape[-1], generator=generator).to(dtype)
    )
    expected = OPERATIONS["rms_norm"](x, weight, 1e-6, order)
    if not provider.supports(request):
        # Honest the other way, too: what it refuses, it would get wrong.
        assert shape[0] == 0 or not torch.equal(provider.call(x, weight, 1e-6, order), expected)
        return
    ours = provider.call(x, weight, 1e-6, order)
    tolerance = 2e-6 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)
