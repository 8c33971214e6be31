# SPDX-License-Identifier: Apache-2.0
"""The bridge hands over views in order, and stops where the path is not the probed one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bedplate.contract.attention import AttentionCallSpec
from bedplate.errors import ContractError
from bedplate.models.bridge import AttentionBridge, StepContext, attention

T, H, K, D, DV = 3, 4, 2, 8, 6


def spec(call_id, module, **overrides):
    fields = {
        "num_heads": H, "num_kv_heads": K, "head_dim": D, "value_dim": DV, "scale": 0.5,
    } | overrides  # fmt: skip
    return AttentionCallSpec(call_id=call_id, module=module, **fields)


class Recorder:
    """Stands in for an attention backend; answers with the number of the call."""

    def __init__(self):
        self.seen = []

    def forward(self, q, k, v, call, batch, *, sinks=None):
        self.seen.append(SimpleNamespace(q=q, k=k, v=v, call=call, batch=batch, sinks=sinks))
        return torch.full((T, H, call.value_dim), float(call.call_id))


def two_layers():
    return nn.ModuleDict({"a": nn.Module(), "b": nn.Module()})


def tensors():
    return torch.rand(1, H, T, D), torch.rand(1, K, T, D), torch.rand(1, K, T, DV)


def call(module, *, mask=None, scaling=0.5, **arguments):
    return attention(module, *tensors(), mask, scaling=scaling, **arguments)


def test_calls_arrive_with_their_description_and_as_views():
    model, backend, batch = two_layers(), Recorder(), object()
    bridge = AttentionBridge(model, [spec(0, "a"), spec(1, "b")])
    query, key, value = tensors()
    with bridge.step(StepContext(batch, backend)):
        out, weights = attention(model["a"], query, key, value, None, scaling=0.5)
        call(model["b"])
    assert weights is None
    assert out.shape == (1, T, H, DV)
    first = backend.seen[0]
    assert first.q.shape == (T, H, D)
    assert (first.k.shape, first.v.shape) == ((T, K, D), (T, K, DV))
    assert first.q.data_ptr() == query.data_ptr(), "no copy"
    assert (first.k.data_ptr(), first.v.data_ptr()) == (key.data_ptr(), value.data_ptr())
    torch.testing.assert_close(first.q[1, 2], query[0, 2, 1])
    assert [seen.call.call_id for seen in backend.seen] == [0, 1]
    assert first.batch is batch


def test_two_calls_of_one_module_have_two_descriptions():
    model, backend = two_layers(), Recorder()
    bridge = AttentionBridge(model, [spec(0, "a"), spec(1, "a", ordinal=1)])
    for _ in range(2):  # and again in the next step
        with bridge.step(StepContext(None, backend)):
            call(model["a"])
            call(model["a"])
    assert [seen.call.ordinal for seen in backend.seen] == [0, 1, 0, 1]


def test_an_alias_stores_nothing():
    model, backend = two_layers(), Recorder()
    bridge = AttentionBridge(model, [spec(0, "a"), spec(1, "b", alias_of=0)])
    with bridge.step(StepContext(None, backend)):
        call(model["a"])
        call(model["b"])
    assert backend.seen[1].k is None
    assert backend.seen[1].v is None


def test_sinks_arrive_only_where_the_description_has_them():
    model, backend, sinks = two_layers(), Recorder(), torch.rand(H)
    bridge = AttentionBridge(model, [spec(0, "a", sinks=True), spec(1, "b")])
    with bridge.step(StepContext(None, backend)):
        call(model["a"], s_aux=sinks)
        call(model["b"])
    assert backend.seen[0].sinks is sinks
    assert backend.seen[1].sinks is None


def test_two_models_have_two_bridges():
    models, backends = [two_layers(), two_layers()], [Recorder(), Recorder()]
    bridges = [AttentionBridge(model, [spec(0, "a")]) for model in models]
    with bridges[0].step(StepContext(None, backends[0])):
        with bridges[1].step(StepContext(None, backends[1])):
            call(models[1]["a"])
        call(models[0]["a"])
    assert [len(backend.seen) for backend in backends] == [1, 1]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("a", "made 1 attention calls where the probe saw 2"),
        ("aba", "more than the 2 attention calls"),
        ("ba", "attention call 0 came from another module than a"),
        ("aa", "attention call 1 came from another module than b"),
    ],
)
def test_another_path_than_the_probed_is_an_error(order, message):
    model = two_layers()
    bridge = AttentionBridge(model, [spec(0, "a"), spec(1, "b")])

    def forward():
        with bridge.step(StepContext(None, Recorder())):
            for name in order:
                call(model[name])

    with pytest.raises(ContractError, match=message):
        forward()


def test_a_model_error_is_not_hidden_by_the_count():
    bridge = AttentionBridge(two_layers(), [spec(0, "a")])
    with pytest.raises(ZeroDivisionError), bridge.step(StepContext(None, Recorder())):
        raise ZeroDivisionError


def test_a_call_outside_a_step_is_an_error():
    model = two_layers()
    AttentionBridge(model, [spec(0, "a")])
    with pytest.raises(ContractError, match="outside a step"):
        call(model["a"])


def test_a_module_the_probe_did_not_see_is_an_error():
    with pytest.raises(ContractError, match="did not see"):
        call(nn.Linear(1, 1))


def test_a_mask_is_an_error():
    model = two_layers()
    bridge = AttentionBridge(model, [spec(0, "a")])
    with (
        pytest.raises(ContractError, match="received a mask"),
        bridge.step(StepContext(None, Recorder())),
    ):
        call(model["a"], mask=torch.zeros(1, 1, T, T))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scaling": 0.25}, "scale is 0.25, the probe saw 0.5"),
        ({"sliding_window": 16}, "window is 16, the probe saw 8"),
        ({"softcap": 30.0}, "softcap is 30.0, the probe saw None"),
    ],
)
def test_check_mode_compares_every_call(arguments, message):
    model = two_layers()
    calls = [spec(0, "a", window=8)]
    with AttentionBridge(model, calls).step(StepContext(None, Recorder())):
        call(model["a"], **arguments)
    bridge = AttentionBridge(model, calls, check=True)
    with (
        pytest.raises(ContractError, match=message),
        bridge.step(StepContext(None, Recorder())),
    ):
        call(model["a"], **arguments)
