# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bedplate.batch.layer_slices import layer_slices
from bedplate.errors import ConfigError


@pytest.mark.parametrize(
    ("num_layers", "count", "slices"),
    [
        (7, 3, ((0, 3), (3, 6), (6, 7))),  # V11
        (6, 3, ((0, 3), (3, 6))),
        (2, 5, ((0, 2),)),
        (0, 1, ()),
    ],
)
def test_slices(num_layers, count, slices):
    assert layer_slices(num_layers, count) == slices


@given(st.integers(0, 50), st.integers(1, 60))
def test_every_layer_runs_once_and_in_order(num_layers, count):
    ran = [
        layer for start, end in layer_slices(num_layers, count) for layer in range(start, end)
    ]
    assert ran == list(range(num_layers))


def test_no_progress_is_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        layer_slices(7, 0)
