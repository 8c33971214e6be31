# SPDX-License-Identifier: Apache-2.0
"""The norm kernel against its meaning, in every rounding order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.tests.offline import compile_launches

from bedplate.contract import OpRequest
from bedplate.errors import ContractError
from bedplate.reference import ops as reference
from bedplate.reference.ops import NORM_ORDERS, RMS_NORM_ORDERS
from bedplate.registry.decisions import DecisionLog
from bedplate.registry.ops import Operations
from bedplate_triton import norm
from bedplate_triton.features import Features
from bedplate_triton.norm import MAX_SIZE, add_norm
from bedplate_triton.ops import register

FEATURES = Features(cores=4)
SHAPES = [(64,), (1, 64), (7, 96), (2, 3, 128), (5, 256), (3, 257), (2, 1000), (9, 4096)]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rms_norm(x, weight, eps, order):
    return norm.rms_norm(x, weight, eps, order, features=FEATURES)


def draw(shape, dtype, device):
    """Rows so small that eps decides, ordinary ones, and large ones."""
    generator = torch.Generator().manual_seed(3)
    scale = 10 ** torch.linspace(-3, 1.5, max(shape[0], 2))[: shape[0]]
    x = torch.randn(shape, generator=generator) * scale.view(-1, *[1] * (len(shape) - 1))
    weight = 1 + 0.5 * torch.randn(shape[-1], generator=generator)
    return x.to(device, dtype), weight.to(device, dtype)


def ulps_apart(got, want):
    """Largest distance in units of the last place."""
    bits = torch.int16 if got.dtype.itemsize == 2 else torch.int32
    low = torch.iinfo(bits).min
    got, want = (t.contiguous().view(bits).long() for t in (got, want))
    got, want = (torch.where(t < 0, low - t, t) for t in (got, want))
    return int((got - want).abs().max())


def check(x, weight, order):
    weight = None if order == "no_weight" else weight
    got = rms_norm(x, weight, 1e-6, order)
    want = reference.rms_norm(x, weight, 1e-6, order)
    assert (got.shape, got.dtype, got.is_contiguous()) == (want.shape, want.dtype, True)
    if x.dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    else:
        # The product of what is one unit apart may be two units apart.
        assert ulps_apart(got, want) <= (2 if order == "weight_after_cast" else 1)
        assert (got != want).float().mean() < 0.01  # only where the mean's last bit decides


@pytest.mark.parametrize("order", RMS_NORM_ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape, dtype, order, device):
    check(*draw(shape, dtype, device), order)


VIEWS = {
    "heads of a packed projection": lambda x: x[None, :, 16:80].unflatten(-1, (4, 16)),
    "one token of it": lambda x: x[None, 2:3, 16:80].unflatten(-1, (4, 16)),
    "heads before tokens": lambda x: x[None, :, 16:80].unflatten(-1, (4, 16)).transpose(1, 2),
    "every second row": lambda x: x[::2],
    "one row for all": lambda x: x[:1].expand(5, -1),
    "every second feature": lambda x: x[:, ::2],
    "three runs": lambda x: x.view(2, 3, 2, 48)[:, :2, :1, :8].expand(2, 2, 3, 8),
    "three kept runs": lambda x: x.view(2, 3, 4, 24).permute(2, 1, 0, 3),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_are_normed_as_their_copies(view, device):
    x = view(draw((6, 96), torch.float16, device)[0])
    weight = torch.linspace(0.5, 1.5, x.shape[-1], device=device, dtype=x.dtype)
    check(x, weight, "weight_after_cast")
    got = rms_norm(x, weight, 1e-6, "weight_fp32")
    assert torch.equal(got, rms_norm(x.contiguous(), weight, 1e-6, "weight_fp32"))


def test_packed_heads_are_read_in_place(device, monkeypatch):
    x = VIEWS["heads of a packed projection"](draw((6, 96), torch.float32, device)[0])
    read = launches(monkeypatch)
    rms_norm(x, None, 1e-6, "no_weight")
    assert read[0][0] is x


@pytest.mark.parametrize("order", NORM_ORDERS)
def test_the_sum_is_rounded_before_its_norm(order, device):
    x, weight = draw((5, 96), torch.bfloat16, device)
    residual = draw((7, 96), torch.bfloat16, device)[0].flip(0)[:5]
    weight = None if order == "no_weight" else weight
    bias = 0.1 * weight if order == "layer_norm" else None
    want, sums = reference.add_norm(x, residual, weight, bias, 1e-6, order)
    got, total = add_norm(x, residual, weight, bias, 1e-6, order, features=FEATURES)
    assert torch.equal(total, sums)
    assert ulps_apart(got, want) <= 2
    assert (got != want).float().mean() < 0.02


def test_a_strided_sum(device):
    x = draw((6, 96), torch.bfloat16, device)[0]
    view, residual = x[:, :48], x[:, 48:]
    got = add_norm(view, residual, None, None, 1e-6, "no_weight", features=FEATURES)
    assert torch.equal(got[1], view + residual)
    assert torch.equal(got[0], rms_norm(got[1], None, 1e-6, "no_weight"))


def test_without_a_residual_the_sum_is_the_input(device):
    x, weight = draw((5, 96), torch.bfloat16, device)
    got, total = add_norm(x, None, weight, None, 1e-6, "weight_fp32", features=FEATURES)
    assert total is x
    assert torch.equal(got, rms_norm(x, weight, 1e-6, "weight_fp32"))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)], ids=str)
def test_no_rows(shape, device):
    x = torch.empty(shape, device=device)
    assert rms_norm(x, None, 1e-6, "no_weight").shape == shape
    both = add_norm(x, x, None, None, 1e-6, "layer_norm", features=FEATURES)
    assert [part.shape for part in both] == [shape, shape]


@given(rows=st.integers(1, 9), size=st.integers(1, 300))
def test_a_row_has_the_same_bits_in_every_batch(rows, size):
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    x, weight = draw((rows, size), torch.float32, device)
    got = rms_norm(x, weight, 1e-6, "weight_fp32")
    alone = [rms_norm(row, weight, 1e-6, "weight_fp32") for row in x]
    assert torch.equal(got, torch.stack(alone))


def test_rows_of_zeros_stay_zero(device):
    x = torch.zeros((3, 64), device=device)
    assert torch.equal(rms_norm(x, None, 1e-6, "no_weight"), x)


@pytest.mark.parametrize(
    ("weight", "order", "match"),
    [
        (torch.ones(8), "weight_fp16", "known: weight_after_cast"),
        (torch.ones(8), "no_weight", "a weight with order 'no_weight'"),
        (None, "weight_fp32", "no weight with order 'weight_fp32'"),
        (torch.ones(4), "weight_fp32", r"\[4\] for 8 features"),
    ],
)
def test_refuses_what_does_not_fit(weight, order, match, device):
    with pytest.raises(ContractError, match=match):
        rms_norm(torch.ones((2, 8), device=device), weight, 1e-6, order)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"order": "weight_fp16"}, "known: .*, layer_norm"),
        ({"residual": torch.ones((1, 8))}, r"a residual of \[1, 8\]"),
        ({"residual": torch.ones((2, 8)).half()}, "float16"),
        ({"bias": torch.ones(8)}, "only layer_norm has one"),
        ({"order": "layer_norm", "bias": torch.ones(4)}, r"a bias of \[4\]"),
        ({"weight": None}, "no weight with order 'weight_fp32'"),
    ],
)
def test_refuses_a_sum_that_does_not_fit(change, match):
    x = torch.ones((2, 8))
    fitting = {"x": x, "residual": x, "weight": x[0], "bias": None, "order": "weight_fp32"}
    with pytest.raises(ContractError, match=match):
        add_norm(**{**fitting, **change}, eps=1e-6, features=FEATURES)


def test_refuses_rows_that_do_not_fit_in_registers(device):
    with pytest.raises(ContractError, match="at most 32768"):
        rms_norm(torch.ones((1, MAX_SIZE + 1), device=device), None, 1e-6, "no_weight")


def launches(monkeypatch):
    """Arguments of every launch, none of which runs."""
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **_: seen.append((*args, grid))

    monkeypatch.setattr(norm, "_norm_rows", Kernel())
    return seen


def test_one_launch_reads_nothing_on_the_host(monkeypatch):
    seen = launches(monkeypatch)
    x, weight = torch.empty((1000, 128), device="meta"), torch.empty(128, device="meta")
    out = rms_norm(x, weight, 1e-6, "weight_fp32")  # a read from meta raises
    assert [(call[5] is out, call[-1]) for call in seen] == [(True, (125,))]
    seen.clear()
    x = torch.empty((8, 4096), device="meta")
    add_norm(x, x, x[0], None, 1e-6, "weight_fp32", features=FEATURES)
    assert [call[-1] for call in seen] == [(8,)]


def test_sizes_are_those_of_the_features_alone(monkeypatch):
    """Other sizes would add in another order, and a row have other bits in a larger batch."""
    choose, keys = norm.configs.choose, []

    def note(op, features, **key):
        keys.append(key)
        return choose(op, features, **key)

    monkeypatch.setattr(norm.configs, "choose", note)
    for rows in (1, 300):
        x = torch.ones((rows, 8))
        norm.rms_norm(x, x[0], 1e-6, "weight_fp32", features=Features())
    assert keys == [{"size": 8}] * 2


@pytest.fixture
def registry():
    operations = Operations(reference.OPERATIONS, DecisionLog(), "here")
    register(operations, "here", FEATURES)
    return operations


@pytest.mark.parametrize(
    ("dtype", "order", "size", "chosen"),
    [
        *(("bfloat16", order, 128, "here") for order in RMS_NORM_ORDERS),
        ("float32", "no_weight", MAX_SIZE, "here"),
        ("float64", "no_weight", 128, "reference"),
        ("float16", "weight_twice", 128, "reference"),
        ("float16", "no_weight", MAX_SIZE + 1, "reference"),
        ("float16", "no_weight", None, "reference"),
    ],
)
def test_offered_where_it_serves(dtype, order, size, chosen, registry):
    attributes = {"order": order, "size": size}
    request = OpRequest(op="rms_norm", dtype=dtype, attributes=attributes)
    assert registry.choose(request).provider == chosen


def test_compiles_for_sm_90_and_rounds_each_step():
    compiled = compile_launches(
        "bedplate_triton.norm",
        "from bedplate_triton.features import Features as F\n"
        "for size, order in ((128, 'weight_after_cast'), (2560, 'one_plus_weight_fp32'),\n"
        "                    (4096, 'weight_fp32'), (MAX_SIZE, 'no_weight')):\n"
        "    x = torch.empty((64, size), dtype=torch.bfloat16, device='meta')\n"
        "    rms_norm(x, None if order == 'no_weight' else x[0], 1e-6, order, features=F())\n"
        "for size in (1024, 16384):\n"
        "    x = torch.empty((64, size), dtype=torch.bfloat16, device='meta')\n"
        "    add_norm(x, x, x[0], x[0], 1e-6, 'layer_norm', features=F())",
    )
    assert len(compiled) == 6
    for kernel in compiled:
        assert kernel["stack"] == 0
        assert kernel["shared"] <= 48 << 10
        assert "rsqrt.approx" in kernel["assembly"]  # as torch's own on such a device
        assert "fma." not in kernel["assembly"]
        assert ".v4" in kernel["assembly"]
