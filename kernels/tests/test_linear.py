# SPDX-License-Identifier: Apache-2.0
"""Linear layers of few rows: every form and size means the same, and what is refused."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from kernels.tests.offline import compile_launches

from bedplate.errors import ContractError
from bedplate.reference import ops as reference
from bedplate.reference.ops import PartialProduct
from bedplate_triton import configs, linear
from bedplate_triton.cases import relative_error
from bedplate_triton.features import Features

FEATURES = Features(cores=4)
GEMV = {"form": "gemv", "fuse": True, "rows": 2, "chunk": 64, "tiles": 1, "depth": 1}
SKINNY = {"form": "skinny", "block_n": 16, "block_k": 32, "splits": 1}
SIZES = {
    "one row a program": GEMV | {"rows": 1},
    "several tiles a program": GEMV | {"tiles": 3},
    "nothing ahead": GEMV | {"depth": 0, "tiles": 2},
    "two steps ahead": GEMV | {"depth": 2, "tiles": 2},
    "more ahead than there is": GEMV | {"depth": 9, "rows": 4},
    "one chunk": GEMV | {"chunk": 1024, "rows": 8},
    "norm apart": GEMV | {"fuse": False},
    "skinny": SKINNY,
    "weights first": SKINNY | {"swap": True},
    "one tile early": SKINNY | {"early": 1},
    "one tile early, weights first": SKINNY | {"early": 1, "swap": True},
    "splits": SKINNY | {"splits": 3},
    "two tiles early": SKINNY | {"early": 2},
    "all tiles early": SKINNY | {"early": 9, "swap": True},
    "splits, all early": SKINNY | {"splits": 3, "early": 9},
    "splits, early": SKINNY | {"splits": 2, "early": 1, "swap": True},
    "more splits than tiles": SKINNY | {"splits": 50},
    "torch": {"form": "torch"},
}


@pytest.fixture
def sized():
    """Let these values be chosen, whatever the files say."""
    with ExitStack() as stack:
        yield lambda values: stack.enter_context(configs.override("linear", **values))


@pytest.fixture
def given(device):
    """Three rows of 170 features, 14 rows of weights, a norm."""
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "x": (3, 170), "residual": (3, 170), "norm_weight": (170,), "weight": (14, 170),
        "bias": (14,),
    }  # fmt: skip
    return {n: torch.randn(s, generator=generator).to(device) for n, s in shapes.items()}


def norm_linear(given, function=linear.norm_linear, **options):
    return function(
        given["x"], given["residual"], given["norm_weight"], None, 1e-6, "weight_fp32",
        given["weight"], given["bias"], "silu", **options,
    )  # fmt: skip


@pytest.mark.parametrize("values", SIZES.values(), ids=SIZES)
def test_every_size_means_the_same(values, given, sized):
    sized(values)
    got, total = norm_linear(given, features=FEATURES)
    want, want_total = norm_linear(given, reference.norm_linear)
    assert relative_error(got, want) < 1e-6
    assert torch.equal(total, want_total)

    got = linear.linear(given["x"], given["weight"], features=FEATURES)
    assert relative_error(got, reference.linear(given["x"], given["weight"])) < 1e-6


def test_input_too_long_to_hold_is_read_where_it_is_used(given, sized, monkeypatch):
    sized(GEMV | {"tiles": 2})
    held = linear.linear(given["x"], given["weight"], features=FEATURES)
    want, _ = norm_linear(given, reference.norm_linear)
    monkeypatch.setattr(linear, "_HELD_BYTES", 0)
    assert torch.equal(linear.linear(given["x"], given["weight"], features=FEATURES), held)
    got, _ = norm_linear(given, features=FEATURES)  # the norm is a kernel of its own then
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("values", [GEMV, SKINNY, SKINNY | {"splits": 3}], ids=str)
def test_a_row_has_the_same_bits_in_every_batch(values, given, sized):
    sized(values)
    x, weight = given["x"], given["weight"]
    alone = [linear.linear(row, weight, features=FEATURES) for row in x]
    assert torch.equal(linear.linear(x, weight, features=FEATURES), torch.stack(alone))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_that_a_norm_adds_make_the_same_bits(dtype, bias, residual, given, sized):
    sized(SKINNY | {"splits": 3})
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    x, weight = given["x"], given["weight"]
    own = given["bias"] if bias else None
    stream = torch.ones((3, 14), dtype=dtype, device=x.device) if residual else None
    norm, second = weight[:, 0].contiguous(), weight[:, :14].contiguous()
    rest = (stream, norm, None, 1e-6, "weight_fp32", second)

    whole = linear.linear(x, weight, own, features=FEATURES)
    parts = linear.linear(x, weight, own, finish=False, features=FEATURES)
    assert isinstance(parts, PartialProduct)
    assert parts.parts.shape == (3, 3, 14)
    assert torch.equal(parts.whole(), whole)
    want = linear.norm_linear(whole, *rest, features=FEATURES)
    got = linear.norm_linear(parts, *rest, features=FEATURES)
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0], want[0])
    both = (reference.norm_linear(product, *rest) for product in (whole, parts))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_what_is_not_split_is_whole(given, sized):
    sized(SKINNY)
    product = linear.linear(given["x"], given["weight"], finish=False, features=FEATURES)
    assert isinstance(product, torch.Tensor)


def test_the_sum_is_new_storage_and_inputs_stay(given):
    before = {name: tensor.clone() for name, tensor in given.items()}
    _, total = norm_linear(given, features=FEATURES)
    assert total.data_ptr() not in {given["x"].data_ptr(), given["residual"].data_ptr()}
    assert all(torch.equal(given[name], tensor) for name, tensor in before.items())


def test_without_a_residual_the_sum_is_the_input(given):
    _, total = norm_linear(given | {"residual": None}, features=FEATURES)
    assert total is given["x"]


def test_no_rows(given):
    empty = given | {"x": given["x"][:0], "residual": given["residual"][:0]}
    out, total = norm_linear(empty, features=FEATURES)
    assert (out.shape, total.shape) == ((0, 7), (0, 170))
    assert linear.linear(empty["x"], given["weight"], features=FEATURES).shape == (0, 14)


def test_many_rows_are_torch_s_own(given):
    x = given["x"].repeat(100, 1)
    got = linear.linear(x, given["weight"], given["bias"], features=FEATURES)
    assert torch.equal(got, reference.linear(x, given["weight"], given["bias"]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weight": torch.ones(14, 8)}, r"\[14, 8\] for 170 features"),
        ({"weight": torch.ones(170, 14).T}, "pass a copy"),
        ({"weight": torch.ones(13, 170), "bias": torch.ones(13)}, "even number, not 13"),
        ({"bias": torch.ones(7)}, r"a bias of \[7\] for 14 outputs"),
        ({"norm_weight": torch.ones(7)}, r"a weight of \[7\] for 170 features"),
        ({"norm_weight": None}, "no weight with order 'weight_fp32'"),
        ({"norm_weight": torch.ones(340)[::2]}, "a weight that is contiguous"),
        ({"weight": torch.ones(14, 170).half()}, "weights of torch.float16 for input of"),
        ({"residual": torch.ones(170)}, r"residual \[170\] of torch.float32 for \[3, 170\]"),
        ({"residual": torch.ones(3, 170).half()}, "residual .* of torch.float16"),
    ],
)
def test_refuses_what_does_not_fit(change, match, given):
    with pytest.raises(ContractError, match=match):
        norm_linear(given | change, features=FEATURES)


@pytest.mark.parametrize(
    ("order", "act", "norm_bias", "match"),
    [
        ("weight_fp16", "silu", False, "known: weight_after_cast"),
        ("weight_fp32", "swish", False, "known: silu"),
        ("weight_fp32", "silu", True, "has no bias"),
    ],
)
def test_refuses_unknown_words(order, act, norm_bias, match, given):
    weight = given["norm_weight"]
    with pytest.raises(ContractError, match=match):
        linear.norm_linear(
            given["x"], None, weight, weight if norm_bias else None, 1e-6, order,
            given["weight"], None, act, features=FEATURES,
        )  # fmt: skip


@pytest.mark.parametrize(("form", "rows"), [("gemv", 5), ("cubic", 1)])
def test_refuses_a_form_that_cannot_serve(form, rows, given, sized):
    sized({"form": form})
    x = given["x"][:1].expand(rows, -1)
    with pytest.raises(ContractError, match=f"says form '{form}' for {rows} rows"):
        linear.linear(x, given["weight"], features=FEATURES)


CHAINED = (
    "from bedplate_triton.features import Chain, Features\n"
    "from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait\n"
    "chain = Chain(wait=gdc_wait, release=gdc_launch_dependents,\n"
    "              options={'launch_pdl': True})\n"
    "features = Features(arch='sm_90', cores=132, shared_bytes=227 << 10, chain=chain)\n"
    "draw = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device='meta')\n"
)
"""A device that chains launches, and tensors of it."""


def test_weights_stream_before_the_input_may_be_read():
    compiled = compile_launches(
        "bedplate_triton.linear",
        CHAINED + "x, weight = draw(1, 4096), draw(6144, 4096)\n"
        "linear(x, weight, features=features)\n"
        "norm_linear(x, x, draw(4096), None, 1e-6, 'weight_after_cast', weight, None, 'silu',\n"
        "            features=features)",
    )
    assert [kernel["kernel"] for kernel in compiled] == ["_gemv", "_gemv"]
    for kernel in compiled:
        before, _, after = kernel["assembly"].partition("griddepcontrol.wait")
        assert "griddepcontrol.launch_dependents" in before
        assert "evict_first" in before
        assert before.count("v4.b32") >= 4
        assert "st.global" not in before
        assert after
        assert kernel["stack"] == 0
        assert "fma.rn.f32" in after


def test_as_many_tiles_are_read_early_as_asked():
    compiled = compile_launches(
        "bedplate_triton.linear",
        CHAINED + "from bedplate_triton import configs\n"
        "for early in (0, 1, 3):\n"
        "    with configs.override('linear', early=early):\n"
        "        linear(draw(8, 1024), draw(4096, 1024), features=features)",
    )
    assert [kernel["kernel"] for kernel in compiled] == ["_skinny"] * 3
    none, one, three = (
        kernel["assembly"].partition("griddepcontrol.wait")[0].count("ld.global")
        for kernel in compiled
    )
    assert none == 0
    assert three == 3 * one > 0
