# SPDX-License-Identifier: Apache-2.0
"""The write of keys and values against indexed copies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.tests.offline import compile_launches

from bedplate.errors import ContractError
from bedplate_triton import kv_write
from bedplate_triton.features import Features

FEATURES = Features(cores=4)
NUM_SLOTS = 20


def write_kv(k, v, slots, k_pool, v_pool, features=FEATURES):
    kv_write.write_kv(k, v, slots, k_pool, v_pool, features=features)


def rows(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(device, dtype)


def pool(*shape, dtype=torch.float32, device="cpu"):
    """Random, so that a slot written by mistake shows."""
    generator = torch.Generator().manual_seed(6)
    return torch.randn((NUM_SLOTS, *shape), generator=generator).to(device, dtype)


def written(pool, slots, rows):
    want = pool.clone()
    want[slots.long()] = rows.to(pool.dtype)
    return want


def check(k, v, slots, k_pool, v_pool):
    want_k = written(k_pool, slots, k)
    want_v = None if v is None else written(v_pool, slots, v)
    write_kv(k, v, slots, k_pool, v_pool)
    assert torch.equal(k_pool, want_k)
    if v is not None:
        assert torch.equal(v_pool, want_v)


SIZES = [(1, 2, 64, 64), (7, 3, 24, 40), (5, 1, 96, 32), (2, 40, 128, 128), (3, 2, 3000, 8)]


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_indexed_copies(size, given, stored, index, device):
    tokens, heads, key_size, value_size = size
    slots = torch.tensor([19, 3, 7, 1, 12, 4, 9][:tokens], dtype=index, device=device)
    check(
        rows(tokens, heads, key_size, dtype=given, device=device),
        rows(tokens, heads, value_size, dtype=given, device=device),
        slots,
        pool(heads, key_size, dtype=stored, device=device),
        pool(heads, value_size, dtype=stored, device=device),
    )


def test_views_of_a_packed_projection_and_of_a_wider_pool(device):
    packed = rows(4, 80, device=device)
    k, v = packed[:, 16:48].unflatten(1, (2, 16)), packed[:, 48:].unflatten(1, (2, 16))
    both = pool(2, 40, device=device)
    untouched = both[..., 32:].clone()
    slots = torch.tensor([2, 9, 4, 11], device=device)
    check(k, v, slots, both[..., :16], both[..., 16:32])
    assert torch.equal(both[..., 32:], untouched)


def test_heads_before_tokens(device):
    k, v = (rows(2, 4, size, device=device).transpose(0, 1) for size in (16, 8))
    slots = torch.tensor([2, 9, 4, 11], device=device)
    check(k, v, slots, pool(2, 16, device=device), pool(2, 8, device=device))


def test_keys_alone_leave_values(device):
    keys = pool(1, 24, device=device)
    slots = torch.tensor([2, 9, 4], device=device)
    check(rows(3, 1, 24, device=device), None, slots, keys, None)
    before = keys[..., :16].clone()
    write_kv(keys[3:6], None, slots[:0].new_tensor([13, 14, 15]), keys, keys[..., :16])
    assert torch.equal(keys[13:16], keys[3:6])
    assert torch.equal(keys[:13, :, :16], before[:13])


def test_slot_zero_swallows_padding(device):
    k, v = rows(4, 2, 16, device=device), rows(4, 2, 16, device=device)
    keys, values = pool(2, 16, device=device), pool(2, 16, device=device)
    slots = torch.tensor([5, 0, 0, 0], device=device)
    want = written(keys, slots[:1], k[:1]), written(values, slots[:1], v[:1])
    write_kv(k, v, slots, keys, values)
    assert torch.equal(keys[1:], want[0][1:])
    assert torch.equal(values[1:], want[1][1:])


def test_no_tokens(device):
    empty, keys = rows(0, 2, 16, device=device), pool(2, 16, device=device)
    check(empty, empty, torch.empty(0, dtype=torch.int32, device=device), keys, keys.clone())


@given(
    slots=st.lists(st.integers(1, NUM_SLOTS - 1), min_size=1, max_size=9, unique=True),
    heads=st.integers(1, 9),
    key_size=st.integers(2, 70),
    value_size=st.integers(2, 70),
)
def test_any_size(slots, heads, key_size, value_size):
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    tokens = len(slots)
    check(
        rows(tokens, heads, key_size, device=device),
        rows(tokens, heads, value_size, device=device),
        torch.tensor(slots, dtype=torch.int32, device=device),
        pool(heads, key_size, device=device),
        pool(heads, value_size, device=device),
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": rows(2, 2, 16)}, "cannot store keys"),
        ({"v": rows(3, 2, 8)}, "cannot store values"),
        ({"v_pool": None}, "no pool of values"),
        ({"k": rows(3, 16, 2).transpose(1, 2)}, "keys, pool and slots must be adjacent"),
        ({"slots": torch.arange(6)[::2]}, "must be adjacent"),
    ],
)
def test_refuses_what_does_not_fit(change, match):
    fitting = {
        "k": rows(3, 2, 16), "v": rows(3, 2, 16), "slots": torch.arange(3),
        "k_pool": pool(2, 16), "v_pool": pool(2, 16),
    }  # fmt: skip
    with pytest.raises(ContractError, match=match):
        write_kv(**{**fitting, **change})


def test_one_launch_reads_nothing_on_the_host(monkeypatch):
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: grids.append(grid)

    monkeypatch.setattr(kv_write, "_write_tokens", Kernel())
    k, keys = (torch.empty((n, 8, 128), device="meta") for n in (100, 5000))
    slots = torch.empty(100, dtype=torch.int32, device="meta")
    write_kv(k, k, slots, keys, keys)  # a read from meta raises
    assert grids == [(100, 1)]


def test_every_program_releases_and_then_waits(counted):
    chain, calls = counted
    k, keys = rows(3, 2, 16), pool(2, 16)
    write_kv(k, k, torch.arange(3), keys, keys.clone(), Features(chain=chain))
    assert calls == ["release", "wait"] * 3


def test_compiles_for_sm_90():
    compiled = compile_launches(
        "bedplate_triton.kv_write",
        "import torch\n"
        "from bedplate_triton.features import Features\n"
        "this = {'features': Features()}\n"
        "def empty(*shape, dtype=torch.bfloat16):\n"
        "    return torch.empty(shape, dtype=dtype, device='meta')\n"
        "slots = empty(64, dtype=torch.int32)\n"
        "k, pool = empty(64, 8, 128), empty(5000, 8, 128)\n"
        "write_kv(k, k, slots, pool, pool, **this)\n"
        "write_kv(k[1:], k[1:], slots[1:], pool, pool, **this)\n"
        "fp8 = empty(5000, 8, 128, dtype=torch.float8_e4m3fn)\n"
        "write_kv(k, k, slots, fp8, fp8, **this)\n"
        "write_kv(empty(64, 1, 576), None, slots, empty(5000, 1, 576), None, **this)\n",
    )
    assert [kernel["stack"] for kernel in compiled] == [0, 0, 0, 0]
    assert compiled[0] == compiled[1]  # slots that begin elsewhere compile nothing new
    assert all(".v4" in kernel["assembly"] for kernel in compiled)
