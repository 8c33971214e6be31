# SPDX-License-Identifier: Apache-2.0
"""What each measure of closeness sees, and what it does not."""

from __future__ import annotations

import math

import pytest
import torch

from bedplate.reference.closeness import (
    differing_share,
    relative_error,
    rounding_bias,
    worst_ulps,
)

EXACT = torch.randn((64, 32), generator=torch.Generator().manual_seed(0))
ROUNDED = EXACT.bfloat16()
CUT = (EXACT.view(torch.int32) & -65536).view(torch.float32).bfloat16()


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (EXACT[:3], EXACT),
        (EXACT.double(), EXACT),
        (torch.full((2,), math.nan), torch.ones(2)),
    ],
)
def test_another_shape_or_dtype_or_nan_is_infinitely_wrong(got, want):
    assert relative_error(got, want) == math.inf


def test_relative_error_is_of_the_whole():
    assert relative_error(EXACT, EXACT) == 0
    assert relative_error(EXACT * 1.01, EXACT) == pytest.approx(0.01, rel=1e-3)
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0


def test_one_element_stands_alone_in_units_of_its_row():
    spoiled = EXACT.clone()
    spoiled[5, 7] += 100 * torch.finfo(torch.float32).eps * float(EXACT[5].abs().max())
    assert relative_error(spoiled, EXACT) < 1e-5
    assert worst_ulps(spoiled, EXACT) == pytest.approx(100, rel=0.05)
    assert worst_ulps(EXACT[:0], EXACT[:0]) == 0


def test_cutting_bits_off_is_half_a_unit_and_half_of_the_numbers():
    assert rounding_bias(ROUNDED, ROUNDED) == 0
    assert rounding_bias(CUT, ROUNDED) == pytest.approx(-0.5, abs=0.05)
    assert differing_share(CUT, ROUNDED) == pytest.approx(0.5, abs=0.05)
    assert relative_error(CUT, ROUNDED) < 8e-3, "a tolerance alone does not see it"
    assert differing_share(CUT[:0], CUT[:0]) == rounding_bias(CUT[:0], CUT[:0]) == 0
