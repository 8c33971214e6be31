# SPDX-License-Identifier: Apache-2.0
"""PPProxyTensors: functions 55–60."""

from __future__ import annotations

import pytest
import torch

from bedplate.batch.pipeline import PPProxyTensors


def make(**changes):
    tensors = {"hidden_states": torch.arange(6.0).reshape(3, 2), "residual": torch.zeros(3, 2)}
    return PPProxyTensors({**tensors, **changes})


def test_holds_named_tensors():
    proxy = make()
    assert len(proxy) == 2
    assert proxy["residual"] is proxy.tensors["residual"]
    proxy["extra"] = torch.ones(3, 1)
    assert len(proxy) == 3


def test_does_not_share_the_callers_mapping():
    mapping = {"residual": torch.zeros(1)}
    proxy = PPProxyTensors(mapping)
    proxy["extra"] = torch.ones(1)
    assert list(mapping) == ["residual"]


def test_a_slice_cuts_rows_of_every_tensor_as_views():
    proxy = make()
    cut = proxy[:2]
    assert isinstance(cut, PPProxyTensors)
    assert cut["hidden_states"].shape == (2, 2)
    assert cut["hidden_states"].data_ptr() == proxy["hidden_states"].data_ptr()


@pytest.mark.parametrize("key", [0, None, (0, 1)])
def test_any_other_key_is_a_type_error(key):
    """Function 56 returned None silently."""
    with pytest.raises(TypeError, match="a name or a slice"):
        make()[key]
    with pytest.raises(TypeError, match="by a name"):
        make()[key] = torch.zeros(1)


def test_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError, match="nothing"):
        make()["nothing"]


def test_equal_contents_are_equal():
    """Function 59 took any two non-empty containers for equal, and two empty ones for not."""
    assert make() == make()
    assert PPProxyTensors({}) == PPProxyTensors({})
    assert PPProxyTensors({"a": torch.ones(1), "b": torch.zeros(1)}) == PPProxyTensors(
        {"b": torch.zeros(1), "a": torch.ones(1)}
    )


@pytest.mark.parametrize(
    "other",
    [
        make(residual=torch.ones(3, 2)),
        make(residual=torch.zeros(2, 2)),
        make(residual=torch.zeros(3, 2, dtype=torch.float64)),
        make(residual=torch.zeros(3, 2, device="meta")),
        make(extra=torch.zeros(3, 2)),
        PPProxyTensors({}),
    ],
    ids=["values", "shape", "dtype", "device", "names", "empty"],
)
def test_different_contents_differ(other):
    """Function 59."""
    assert make() != other
    assert other != make()


def test_is_not_equal_to_other_types_and_not_hashable():
    assert make() != {"residual": 1}
    with pytest.raises(TypeError, match="unhashable"):
        hash(make())


def test_repr_shows_shapes_not_values():
    assert repr(make()) == (
        "PPProxyTensors(hidden_states=[3, 2] torch.float32, residual=[3, 2] torch.float32)"
    )
