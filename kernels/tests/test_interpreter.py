# SPDX-License-Identifier: Apache-2.0
"""The mended interpreter rounds and multiplies bfloat16 as torch does."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _cast(x, out, n: tl.constexpr):
    lanes = tl.arange(0, n)
    tl.store(out + lanes, tl.load(x + lanes).to(out.dtype.element_ty))


@triton.jit
def _arithmetic(a, b, out, n: tl.constexpr):
    lanes = tl.arange(0, n)
    tl.store(out + lanes, tl.load(a + lanes) * tl.load(b + lanes) + tl.load(a + lanes))


@triton.jit
def _product(a, b, out, count, n: tl.constexpr):
    lanes = tl.arange(0, n)
    where = lanes[:, None] * n + lanes[None, :]
    acc = tl.zeros([n, n], tl.float32)
    for _ in range(count):  # a bound that is a tensor
        acc = tl.dot(tl.load(a + where), tl.load(b + where), acc)
    tl.store(out + where, acc)


@triton.jit
def _some(out, count, n: tl.constexpr):
    lanes = tl.arange(0, n)
    for row in tl.static_range(3):
        tl.store(out + row * n + lanes, 1.0, mask=(lanes < n - 1) & (row < count))


def draw(*shape, device):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def test_casts_round_to_nearest(device):
    special = torch.tensor([float("nan"), float("inf"), 0.0, -0.0] * 2, device=device)
    x = torch.cat((draw(120, device=device), special))
    out = torch.empty(128, dtype=torch.bfloat16, device=device)
    _cast[(1,)](x, out, 128)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3fn"])
def test_every_float_of_eight_bits_is_read_as_torch_reads_it(name, device):
    if device.type != "cpu":
        pytest.skip(f"missing capability: not every device converts {name}")
    every = torch.arange(256, dtype=torch.uint8).view(getattr(torch, name))
    finite = every.float().isfinite()
    out = torch.empty(256)
    _cast[(1,)](every, out, 256)
    assert torch.equal(out[finite], every.float()[finite])


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3fn",
                                  "float8_e5m2"])  # fmt: skip
def test_floats_of_eight_bits_are_rounded_as_torch_rounds_them(name, given, device):
    if device.type != "cpu":
        pytest.skip(f"missing capability: not every device converts {name}")
    x = torch.cat((torch.linspace(-4, 4, 255), torch.tensor([1.97]))).to(given)
    out = torch.empty(256).to(getattr(torch, name))
    _cast[(1,)](x, out, 256)
    assert torch.equal(out.float(), x.to(out.dtype).float())


def test_masks_of_what_is_known_and_what_is_not(device):
    out = torch.zeros(3, 4, device=device)
    _some[(1,)](out, 2, 4)
    assert out.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]


def test_arithmetic(device):
    a, b = draw(2, 128, device=device).bfloat16()
    out = torch.empty_like(a)
    _arithmetic[(1,)](a, b, out, 128)
    torch.testing.assert_close(out, a * b + a, rtol=1e-2, atol=1e-2)


def test_products(device):
    a, b = draw(2, 16, 16, device=device).bfloat16()
    out = torch.empty(16, 16, device=device)
    _product[(1,)](a, b, out, 2, 16)
    torch.testing.assert_close(out, 2 * a.float() @ b.float(), rtol=1e-5, atol=1e-5)
