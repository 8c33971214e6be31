# SPDX-License-Identifier: Apache-2.0
"""A row's product has the same bits with one other row or with hundreds."""

from __future__ import annotations

import pytest
import torch

from bedplate.errors import ContractError
from bedplate_triton.features import Features
from bedplate_triton.invariant import invariant_linear, invariant_norm_linear

FEATURES = Features(cores=4)


def draw(*shape, dtype, device):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits_do_not_depend_on_other_rows(dtype, device):
    x = draw(150, 136, dtype=dtype, device=device)
    weight, residual = draw(96, 136, dtype=dtype, device=device), x.flip(0)
    whole = invariant_linear(x, weight, features=FEATURES)
    norm = (draw(136, dtype=dtype, device=device), None, 1e-6, "weight_after_cast")
    normed, total = invariant_norm_linear(
        x, residual, *norm, weight, act="silu", features=FEATURES
    )
    for rows in (slice(0, 1), slice(70, 75), slice(149, 150), slice(3, 100)):
        assert torch.equal(invariant_linear(x[rows], weight, features=FEATURES), whole[rows])
        some, sums = invariant_norm_linear(
            x[rows], residual[rows], *norm, weight, act="silu", features=FEATURES
        )
        assert torch.equal(some, normed[rows])
        assert torch.equal(sums, total[rows])


@pytest.mark.parametrize("slices", [2, 3, 8])
def test_bits_do_not_depend_on_where_programs_run(slices, device):
    x, weight = (
        draw(150, 64, dtype=torch.bfloat16, device=device),
        draw(200, 64, dtype=torch.bfloat16, device=device),
    )
    dealt = invariant_linear(x, weight, features=Features(cores=4, slices=slices))
    assert torch.equal(dealt, invariant_linear(x, weight, features=FEATURES))


def test_no_rows(device):
    x = torch.empty(0, 32, device=device)
    assert invariant_linear(x, torch.ones(8, 32, device=device), features=FEATURES).shape == (
        0,
        8,
    )


def test_what_does_not_fit_is_refused(device):
    with pytest.raises(ContractError, match="cannot be made"):
        invariant_linear(torch.ones(2, 8), torch.ones(4, 9), features=FEATURES)
