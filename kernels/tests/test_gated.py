# SPDX-License-Identifier: Apache-2.0
"""Gated activations: what the cases cannot say."""

from __future__ import annotations

import pytest
import torch
from kernels.tests.offline import compile_launches

from bedplate.errors import ContractError
from bedplate.reference import ops as reference
from bedplate.reference.ops import ACTIVATIONS
from bedplate_triton import gated
from bedplate_triton.features import Features
from bedplate_triton.gated import act_and_mul

FEATURES = Features(cores=4)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # infinite is right there
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_bfloat16_is_activated_as_by_torch(act, device):
    every = torch.arange(1 << 16, dtype=torch.int32).short().view(torch.bfloat16)
    gate = every[every.isfinite()].view(16, -1).to(device)
    x = torch.cat((gate, torch.ones_like(gate)), dim=-1)
    got, want = act_and_mul(x, act, features=FEATURES), reference.act_and_mul(x, act)
    differ = got != want
    assert differ.float().mean() < 0.005
    # Where the activation all but vanishes, float32 itself has few bits left.
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_what_is_no_number_stays_so(act, device):
    x = torch.tensor([[float("nan"), 1.0, 1.0, 1.0]], device=device)
    assert act_and_mul(x, act, features=FEATURES).isnan().tolist() == [[True, False]]


def test_a_transposed_input_is_copied(device):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)).to(device).T
    got = act_and_mul(x, "relu", features=FEATURES)
    assert torch.equal(got, reference.act_and_mul(x, "relu"))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (3, 0)], ids=str)
def test_nothing_to_do(shape, device):
    x = torch.empty(shape, device=device)
    assert act_and_mul(x, "silu", features=FEATURES).shape == (*shape[:-1], shape[-1] // 2)


@pytest.mark.parametrize(
    ("size", "act", "match"), [(8, "tanh", "known: silu"), (7, "silu", "got 7 features")]
)
def test_refuses_what_does_not_fit(size, act, match):
    with pytest.raises(ContractError, match=match):
        act_and_mul(torch.ones((2, size)), act, features=FEATURES)


def test_one_launch_reads_nothing_on_the_host(monkeypatch):
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: grids.append(grid)

    monkeypatch.setattr(gated, "_gate_rows", Kernel())
    act_and_mul(torch.empty((100, 2 * 3072), device="meta"), "silu", features=FEATURES)
    assert grids == [(300,)]


def test_every_program_releases_and_then_waits(counted):
    chain, calls = counted
    act_and_mul(torch.ones((3, 16)), "silu", features=Features(chain=chain))
    assert calls == ["release", "wait"] * 3


def test_compiles_for_sm_90():
    compiled = compile_launches(
        "bedplate_triton.gated",
        "from bedplate_triton.features import Features\n"
        "for act in ('silu', 'gelu'):\n"
        "    for rows in (64, 2048):\n"
        "        x = torch.empty((rows, 6144), dtype=torch.bfloat16, device='meta')\n"
        "        act_and_mul(x, act, features=Features())",
    )
    assert compiled[0::2] == compiled[1::2]  # a number of rows compiles nothing new
    for kernel in compiled:
        assert kernel["stack"] == 0
        assert kernel["assembly"].count(".v4") == 3
