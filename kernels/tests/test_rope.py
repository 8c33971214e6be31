# SPDX-License-Identifier: Apache-2.0
"""Norm, rotation and write of heads: what the cases cannot say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.tests.offline import compile_launches

from bedplate.errors import ContractError
from bedplate.reference import rope as reference
from bedplate.reference.ops import RMS_NORM_ORDERS
from bedplate.reference.rope import ROPE_STYLES, HeadNorm, RopeTable
from bedplate_triton import rope as kernel
from bedplate_triton.features import Features

FEATURES = Features(cores=4)
HEADS, KV_HEADS, SIZE, POSITIONS = 4, 2, 16, 40
NUM_SLOTS = 20


def turn(arguments, features=FEATURES):
    kernel.qk_norm_rope_write(**arguments, features=features)


def draw(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def table(half, dtype=torch.bfloat16, **facts):
    angles = torch.arange(POSITIONS)[:, None] / torch.arange(1, half + 1)
    return RopeTable(cos=angles.cos().to(dtype), sin=angles.sin().to(dtype), **facts)


def head_norm(order="weight_after_cast", flat=False, size=SIZE):
    sizes = (HEADS * size, KV_HEADS * size) if flat else (size, size)
    weights = [None if order == "no_weight" else 1 + draw(n, seed=n) for n in sizes]
    return HeadNorm(q_weight=weights[0], k_weight=weights[1], eps=1e-6, order=order, flat=flat)


def make(tokens=5, *, size=SIZE, value_size=SIZE, seed=0, **change):
    slots = 1 + torch.randperm(NUM_SLOTS - 1, generator=torch.Generator().manual_seed(seed))
    fitting = {
        "q": draw(tokens, HEADS, size, seed=seed),
        "k": draw(tokens, KV_HEADS, size, seed=seed + 1),
        "v": draw(tokens, KV_HEADS, value_size, seed=seed + 2),
        "positions": torch.arange(tokens) * 7 % POSITIONS,
        "rope": table(size // 2),
        "norm": None,
        "keys": draw(NUM_SLOTS, KV_HEADS, size, seed=seed + 3),
        "values": draw(NUM_SLOTS, KV_HEADS, value_size, seed=seed + 4),
        "slots": slots[:tokens].int(),
    }
    return {**fitting, **change}


def moved(arguments, device):
    """A copy on the device."""

    def move(value):
        if isinstance(value, torch.Tensor):
            return value.clone().to(device)
        if isinstance(value, RopeTable):
            return replace(value, cos=move(value.cos), sin=move(value.sin))
        if isinstance(value, HeadNorm):
            weights = {"q_weight": move(value.q_weight), "k_weight": move(value.k_weight)}
            return replace(value, **weights)
        return value

    return {name: move(value) for name, value in arguments.items()}


def both(arguments, device):
    """Every changed tensor, by the kernel and by its meaning."""
    got, want = moved(arguments, device), moved(arguments, device)
    turn(got)
    reference.qk_norm_rope_write(**want)
    names = ("q", "k", "v", "keys", "values")
    return [(got[name], want[name]) for name in names if got[name] is not None]


@pytest.mark.parametrize("flat", [False, True], ids=["a head", "all heads"])
@pytest.mark.parametrize("style", ROPE_STYLES)
@pytest.mark.parametrize("order", RMS_NORM_ORDERS)
def test_nearly_all_bits_of_normed_heads_are_equal(order, style, flat, device):
    arguments = make(7, rope=table(SIZE // 2, style=style), norm=head_norm(order, flat))
    for got, want in both(arguments, device):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
        assert (got != want).float().mean() < 0.01


@settings(max_examples=40)
@given(
    half=st.integers(1, 12),
    rest=st.integers(0, 9),
    value_size=st.integers(1, 20),
    tokens=st.integers(1, 4),
    style=st.sampled_from(ROPE_STYLES),
    stepwise=st.booleans(),
)
def test_any_size_without_a_norm_has_equal_bits(
    half, rest, value_size, tokens, style, stepwise
):
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    rope = table(half, style=style, stepwise=stepwise)
    arguments = make(tokens, size=2 * half + rest, value_size=value_size, rope=rope)
    for got, want in both(arguments, device):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_steps_round_only_in_tables_of_the_same_dtype(table_dtype, dtype, device):
    arguments = make(rope=table(SIZE // 2, table_dtype))
    arguments = {
        name: value.to(dtype) if name in ("q", "k", "v") else value
        for name, value in arguments.items()
    }
    for got, want in both(arguments, device):
        assert torch.equal(got, want)


def test_a_pool_of_float8(device):
    arguments = make()
    for name in ("keys", "values"):
        arguments[name] = arguments[name].to(torch.float8_e4m3fn)
    wrong = 0.05 if device.type == "cpu" else 0.0  # the interpreter forgets some carries
    for got, want in both(arguments, device):
        assert (got.float() != want.float()).float().mean() <= wrong


def test_heads_before_tokens(device):
    arguments = make(3)
    for name in ("q", "k", "v"):
        arguments[name] = arguments[name].transpose(0, 1).contiguous().transpose(0, 1)
    for got, want in both(arguments, device):
        assert torch.equal(got, want)


def test_pools_in_a_wider_pool(device):
    pools = [draw(NUM_SLOTS, KV_HEADS, 3 * SIZE, seed=9).to(device) for _ in range(2)]
    for pool, run in zip(
        pools, (turn, lambda a: reference.qk_norm_rope_write(**a)), strict=True
    ):
        keys, values, _ = pool.split(SIZE, dim=-1)
        run({**moved(make(3), device), "keys": keys, "values": values})
    assert torch.equal(*pools)


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_tokens_do_not_see_each_other(tokens, device):
    whole = moved(make(8, norm=head_norm()), device)
    part = {
        name: value[:tokens].clone() if name in ("q", "k", "v", "positions", "slots") else value
        for name, value in moved(make(8, norm=head_norm()), device).items()
    }
    turn(whole)
    turn(part)
    assert torch.equal(whole["q"][:tokens], part["q"])
    assert torch.equal(whole["k"][:tokens], part["k"])


def test_a_write_alone_leaves_the_heads(monkeypatch):
    grids = launches(monkeypatch)
    turn(make(3, rope=None))
    assert grids == [(3 * 2,)]
    turn(make(3, rope=None, keys=None, values=None, slots=None))
    turn(make(0))
    assert grids == [(3 * 2,)]


def launches(monkeypatch):
    """Grids of every launch, none of which runs."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: grids.append(grid)

    monkeypatch.setattr(kernel, "_turn_and_write", Kernel())
    return grids


def test_one_launch_reads_nothing_on_the_host(monkeypatch):
    grids = launches(monkeypatch)
    turn(moved(make(norm=head_norm()), "meta"))  # a read from meta raises
    assert grids == [(5 * 3,)]


@pytest.mark.parametrize("rope", [table(SIZE // 2), None], ids=["turns", "writes"])
def test_every_program_releases_and_then_waits(rope, counted):
    chain, calls = counted
    turn(make(2, rope=rope), Features(chain=chain))
    assert calls == ["release", "wait"] * 2 * (3 if rope else 2)


NORM = head_norm()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": draw(4, HEADS, SIZE)}, "do not fit each other"),
        ({"k": draw(5, KV_HEADS, SIZE, dtype=torch.float32)}, "do not fit each other"),
        ({"v": draw(5, HEADS, SIZE)}, "do not fit each other"),
        ({"positions": torch.arange(4)}, "do not fit each other"),
        ({"q": draw(5, SIZE, HEADS).transpose(1, 2)}, "heads and positions must be adjacent"),
        ({"positions": torch.arange(10)[::2]}, "heads and positions must be adjacent"),
        ({"slots": None}, "pass all or none"),
        ({"keys": None}, "pass all or none"),
        ({"slots": torch.arange(4)}, "cannot store keys"),
        ({"values": draw(9, KV_HEADS, 8)}, "cannot store keys"),
        ({"slots": torch.arange(10)[::2]}, "pools and slots must be adjacent"),
        ({"keys": draw(9, SIZE, KV_HEADS).transpose(1, 2)}, "pools and slots must be adjacent"),
        ({"rope": table(4, style="spiral")}, "no style of rotation 'spiral'; known: half"),
        ({"rope": table(9)}, "turns 18, but heads have 16"),
        ({"rope": replace(table(4), sin=table(5).sin)}, "must lie alike"),
        ({"norm": replace(NORM, order="layer_norm")}, "no rounding order 'layer_norm'"),
        ({"norm": replace(NORM, q_weight=None)}, "no weight with order 'weight_after_cast'"),
        ({"norm": replace(NORM, order="no_weight")}, "a weight with order 'no_weight'"),
        ({"norm": replace(NORM, flat=True)}, r"a weight of \[16\]; pass \[64\]"),
    ],
)
def test_refuses_what_does_not_fit(change, match):
    with pytest.raises(ContractError, match=match):
        turn(make(**change))


def test_refuses_a_flat_norm_that_no_program_can_hold():
    norm = HeadNorm(q_weight=None, k_weight=None, eps=1e-6, order="no_weight", flat=True)
    heads = {"q": draw(1, 129, 128), "k": draw(1, 1, 128), "v": draw(1, 1, 128)}
    change = {"rope": None, "keys": None, "values": None, "slots": None, **heads}
    with pytest.raises(ContractError, match="at most 16384 numbers"):
        turn(make(1, norm=norm, **change))


def test_compiles_for_sm_90_and_rounds_each_step():
    compiled = compile_launches(
        "bedplate_triton.rope",
        "import torch\n"
        "from bedplate.reference.rope import HeadNorm, RopeTable\n"
        "from bedplate_triton.features import Features\n"
        "def empty(*shape, dtype=torch.bfloat16):\n"
        "    return torch.empty(shape, dtype=dtype, device='meta')\n"
        "def go(tokens, first, pool, style, dtype=torch.bfloat16):\n"
        "    packed = empty(tokens, 48 * 128).view(tokens, 48, 128)\n"
        "    q, k, v = packed[:, :32], packed[:, 32:40], packed[:, 40:]\n"
        "    integers = empty(tokens + first, dtype=torch.int64)[first:]\n"
        "    rope = RopeTable(cos=empty(999, 64), sin=empty(999, 64), style=style)\n"
        "    norm = HeadNorm(q_weight=empty(128), k_weight=empty(128), eps=1e-6,\n"
        "                    order='weight_after_cast')\n"
        "    keys = empty(5000, 8, 128, dtype=pool)\n"
        "    qk_norm_rope_write(q, k, v, integers, rope, norm, keys, keys, integers,\n"
        "                       features=Features())\n"
        "go(100, 0, torch.bfloat16, 'half')\n"
        "go(111, 1, torch.bfloat16, 'half')\n"
        "go(1, 0, torch.bfloat16, 'half')\n"
        "go(100, 0, torch.float8_e4m3fn, 'half')\n"
        "go(100, 0, torch.bfloat16, 'interleaved')\n",
    )
    assert compiled[0] == compiled[1]  # a number of tokens and where they begin
    for each in compiled:
        assert each["stack"] == 0
        assert "fma." not in each["assembly"]
        assert ".v4" in each["assembly"]
    assert all(each["shared"] == 0 for each in compiled[:3])  # nothing travels
