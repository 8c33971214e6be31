# SPDX-License-Identifier: Apache-2.0
"""Sampling: what cases cannot say, namely bounds that any sampler keeps, and its parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernels.tests.offline import compile_launches

from bedplate.errors import ContractError, UnsupportedError
from bedplate.reference import sampling as reference
from bedplate.reference.sampling import NOT_A_NUMBER, FilterParams, SamplingTables
from bedplate_triton import configs, sampling
from bedplate_triton.features import Features, nothing
from bedplate_triton.sampling import sample_tokens

EPS = 1e-5
SIZES = {"block_warps": 4, "row_warps": 4}


def tables_of(settings, seeds, device):
    """Request row 0 is padding; ``settings`` are temperature, top-k, top-p and min-p."""
    columns = torch.tensor([(0, 0, 1, 0), *settings], dtype=torch.float64).T
    return SamplingTables(
        temperature=columns[0].float().to(device),
        top_k=columns[1].int().to(device),
        top_p=columns[2].float().to(device),
        min_p=columns[3].float().to(device),
        seed=torch.tensor([0, *seeds]).to(device),
    )


def draw(logits, settings, seeds=None, function=sample_tokens, **options):
    """Tokens and the numbers that chose them; every row has its own settings."""
    size, device = len(logits), logits.device
    seeds = list(range(size)) if seeds is None else seeds
    rows = torch.arange(1, size + 1, dtype=torch.int32, device=device)
    lengths = torch.arange(7, 7 + size, dtype=torch.int32, device=device)
    tables = tables_of(settings, seeds, device)
    last = torch.full((size + 1,), -9, device=device)
    if function is sample_tokens:
        options = {"features": Features(), **options}
    tokens = function(logits, rows, lengths, tables, last, **options)
    assert last.tolist() == [-9, *tokens.clamp(min=0).tolist()]
    return tokens, reference.uniform_on_device(tables.seed[rows.long()], lengths.long())


def bounds_hold(logits, settings, token, u):
    """Whether ``u`` lies in the share of ``token`` among what the filters keep, in float64."""
    temperature, k, p, least = settings
    probs = torch.softmax(logits.double().cpu() / temperature, dim=-1)[None]
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    for edge in (0.0, -EPS, EPS):  # sums in another order may decide the last token of top-p
        params = FilterParams(
            top_k=torch.tensor([k or probs.shape[1]]),
            top_p=torch.tensor([p + edge if p < 1 else p], dtype=torch.float64),
            min_p=torch.tensor([least], dtype=torch.float64),
        )
        filtered = reference.filter_sorted(ordered, params)
        kept = torch.zeros_like(probs).scatter_(-1, order, filtered)[0]
        upto = (kept / kept.sum()).cumsum(0)
        low = upto[token - 1] if token else 0.0
        if kept[token] > 0 and low - EPS <= u <= upto[token] + EPS:
            return True
    return False


FILTERS = {
    "plain": (1.0, 0, 1.0, 0.0),
    "cold": (0.05, 0, 1.0, 0.0),
    "hot": (3.0, 0, 1.0, 0.0),
    "top-k": (1.0, 5, 1.0, 0.0),
    "top-k 1": (1.0, 1, 1.0, 0.0),
    "top-k above all": (1.0, 9000, 1.0, 0.0),
    "top-p": (0.8, 0, 0.9, 0.0),
    "top-p of nearly all": (2.0, 0, 0.999, 0.0),
    "top-p of nearly none": (1.0, 0, 1e-6, 0.0),
    "min-p": (1.5, 0, 1.0, 0.05),
    "min-p 1": (1.0, 0, 1.0, 1.0),
    "all": (0.9, 50, 0.8, 0.01),
}


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        *((settings, torch.bfloat16) for settings in FILTERS.values()),
        *((FILTERS[name], torch.float16) for name in ("cold", "top-k", "top-p")),
        *((FILTERS[name], torch.float32) for name in ("hot", "min-p", "all")),
    ],
    ids=[
        *FILTERS, "float16 cold", "float16 top-k", "float16 top-p", "float32 hot",
        "float32 min-p", "float32 all",
    ],
)  # fmt: skip
def test_tokens_are_where_their_number_falls(settings, dtype, device):
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn((2, 1337), generator=generator)).to(dtype).to(device)
    tokens, u = draw(logits, [settings] * 2)
    for row, token, number in zip(logits, tokens.tolist(), u.tolist(), strict=True):
        assert bounds_hold(row, settings, token, number)


SMALLER = {
    "candidates": {"BLOCK": 64, "GROUP": 4, "TILE": 256, "ROOM": 512},
    "room for just the candidates": {"BLOCK": 64, "GROUP": 1, "TILE": 256, "ROOM": 30},
    "no room for candidates": {"BLOCK": 64, "GROUP": 2, "TILE": 256, "ROOM": 4},
    "candidates in several tiles": {"BLOCK": 64, "GROUP": 1, "TILE": 16, "ROOM": 512},
    "one block": {"BLOCK": 512, "GROUP": 1, "TILE": 512, "ROOM": 512},
}


@pytest.mark.parametrize("sizes", SMALLER.values(), ids=SMALLER)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_any_sizes_give_the_same(sizes, ties, device):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn((3, 300), generator=generator) - 30
    heavy = torch.randperm(300, generator=generator)[:30]
    logits[:, heavy] = 7.0 if ties else 5 + 4 * torch.rand((3, 30), generator=generator)
    logits = logits.bfloat16().to(device)
    settings = [FILTERS["all"], (0.7, 0, 0.6, 0.0), FILTERS["plain"]]
    want, _ = draw(logits, settings, function=reference.sample_tokens)
    with configs.override("sampling", **SIZES, **sizes):
        got, _ = draw(logits, settings)
    assert got.tolist() == want.tolist()


def test_extreme_numbers_never_choose_what_weighs_nothing(device):
    seeds = np.arange(1 << 20, dtype=np.uint64)
    u = reference.uniform(seeds, np.full(len(seeds), 7))
    seeds = [int(u.argmin()), int(u.argmax())]
    logits = torch.full((2, 300), float("-inf"), device=device)
    logits[:, 100:200] = 1.0
    for settings in (FILTERS["plain"], (1.0, 150, 1.0, 0.0)):
        # The second row is one position later, so each goes alone.
        alone = [draw(logits[:1], [settings], [seed])[0].item() for seed in seeds]
        assert alone == [100, 199]


def test_infinities_without_filters_that_matter(device):
    logits = torch.zeros((4, 50), device=device)
    logits[0, 3] = logits[1, 3] = float("inf")
    logits[2:] = float("-inf")
    settings = [(0.0, 0, 1.0, 0.0), FILTERS["all"]] * 2
    tokens, _ = draw(logits, settings)
    assert tokens.tolist() == [3, NOT_A_NUMBER, 0, NOT_A_NUMBER]


def test_a_batch_does_not_change_its_rows(device):
    """Block sums have the same bits however many blocks a program holds."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn((2, 5000), generator=generator).bfloat16().to(device)
    tables = tables_of([FILTERS["hot"]] * 2, [1, 2], device)
    rows = torch.tensor([1, 2], dtype=torch.int32, device=device)
    seen = []
    for group in (1, 2, 4):
        sums = torch.zeros((2, 5), device=device)
        places = torch.zeros((2, 5), dtype=torch.int32, device=device)
        sampling._blocks_kernel[(triton.cdiv(5, group), 2)](
            logits, rows, tables.temperature, torch.zeros_like(logits[:, :5]), places, sums,
            5000, V=5000, BLOCK=1024, GROUP=group, WAIT=nothing, RELEASE=nothing, num_warps=4,
        )  # fmt: skip
        seen.append(sums)
    assert all(torch.equal(seen[0], other) for other in seen)


@triton.jit
def _parts_kernel(x, keys, values, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    key = sampling._key(tl.load(x + place))
    tl.store(keys + place, key)
    tl.store(values + place, sampling._value(key, x.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keys_are_ordered_like_all_numbers(dtype, device):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    x = torch.where(torch.isnan(x), torch.zeros_like(x), x).to(device)
    keys = torch.empty(1 << 16, dtype=torch.int32, device=device)
    values = torch.empty(1 << 16, device=device)
    _parts_kernel[(1,)](x, keys, values, BLOCK=1 << 16, num_warps=16)
    assert torch.equal(values, x.float())
    x, order = x.float().sort()
    assert torch.equal(keys[order].diff() > 0, x.diff() > 0)
    assert keys.min() == sampling._LOWEST[dtype]


def test_keys_are_ordered_like_wide_numbers(device):
    generator = torch.Generator().manual_seed(5)
    ends = torch.tensor([-0.0, 0.0, 1e-45, -1e-45, float("inf"), -float("inf")])
    x = torch.randn(1024, generator=generator) * 10 ** (
        30 * torch.randn(1024, generator=generator)
    )
    x[:6] = ends
    x = x.to(device)
    keys = torch.empty(1024, dtype=torch.int32, device=device)
    values = torch.empty(1024, device=device)
    _parts_kernel[(1,)](x, keys, values, BLOCK=1024)
    assert torch.equal(values, x)
    x, order = x.sort()
    assert torch.equal(keys[order].long().diff() > 0, x.diff() > 0)
    assert keys.min() == sampling._LOWEST[torch.float32]


@triton.jit
def _quotient_kernel(x, temperatures, out, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    temperature = tl.load(temperatures + place)
    inverse = tl.div_rn(1.0, temperature)
    tl.store(out + place, sampling._quotient(tl.load(x + place), temperature, inverse))


def test_quotients_are_those_of_a_division(device):
    generator = torch.Generator().manual_seed(7)
    x = (20 * torch.randn(4096, generator=generator)).to(device)
    x[:2] = torch.tensor([float("-inf"), 0.0])
    temperature = (0.01 + 2 * torch.rand(4096, generator=generator)).to(device)
    out = torch.empty_like(x)
    _quotient_kernel[(1,)](x, temperature, out, BLOCK=4096)
    # A host without fused multiply-add rounds the last step twice.
    bound = 0 if device.type != "cpu" else 2.0**-23
    torch.testing.assert_close(out, x / temperature, rtol=bound, atol=0)


@triton.jit
def _uniform_kernel(seeds, positions, out, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    number = sampling._uniform(tl.load(seeds + place), tl.load(positions + place))
    tl.store(out + place, number)


def test_numbers_are_those_of_the_host(device):
    generator = torch.Generator().manual_seed(6)
    seeds = torch.randint(-(2**62), 2**62, (4096,), generator=generator) * 2
    seeds[:4] = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    positions = torch.randint(0, 2**31 - 1, (4096,), generator=generator).int()
    out = torch.empty(4096, device=device)
    _uniform_kernel[(1,)](seeds.to(device), positions.to(device), out, BLOCK=4096)
    want = reference.uniform(seeds.numpy().view(np.uint64), positions.long().numpy())
    assert np.array_equal(out.cpu().numpy(), want)


def test_no_rows(device):
    tokens, _ = draw(torch.empty((0, 50), device=device), [])
    assert tokens.tolist() == []


def test_rows_of_a_wider_buffer(device):
    wide = torch.randn((3, 64), generator=torch.Generator().manual_seed(8)).to(device)
    tokens, _ = draw(wide[:, :50], [(0.0, 0, 1.0, 0.0)] * 3)
    assert torch.equal(tokens, wide[:, :50].argmax(1))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"logits": torch.zeros((3, 9), dtype=torch.float64)}, UnsupportedError, "float64"),
        ({"logits": torch.zeros((9, 3)).T}, ContractError, "adjacent"),
        ({"rows": torch.zeros(6, dtype=torch.int32)[::2]}, ContractError, "adjacent"),
        (
            {"rows": torch.zeros(2, dtype=torch.int32)},
            ContractError,
            r"3 rows of logits, \[2\]",
        ),
    ],
)
def test_refuses_what_does_not_fit(change, error, match):
    fitting = {
        "logits": torch.zeros((3, 9)), "rows": torch.zeros(3, dtype=torch.int32),
        "seq_lens": torch.zeros(3, dtype=torch.int32),
        "tables": tables_of([(0, 0, 1, 0)], [0], "cpu"),
        "last_tokens": torch.zeros(2, dtype=torch.int64),
    }  # fmt: skip
    with pytest.raises(error, match=match):
        sample_tokens(**{**fitting, **change}, features=Features())


def test_two_launches_read_nothing_on_the_host(monkeypatch):
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: grids.append(grid)

    monkeypatch.setattr(sampling, "_blocks_kernel", Kernel())
    monkeypatch.setattr(sampling, "_rows_kernel", Kernel())
    meta = lambda *shape: torch.empty(shape, dtype=torch.int32, device="meta")  # noqa: E731
    tables = tables_of([(0, 0, 1, 0)], [0], "meta")
    logits = torch.empty((4, 151936), device="meta")
    sample_tokens(logits, meta(4), meta(4), tables, meta(2), features=Features())
    assert grids == [(149, 4), (4,)]


def test_compiles_once_for_batches_of_a_class():
    compiled = compile_launches(
        "bedplate_triton.sampling",
        "from bedplate.reference.sampling import SamplingTables\n"
        "from bedplate_triton.features import Features\n"
        "def empty(*shape, dtype=torch.int32):\n"
        "    return torch.empty(shape, dtype=dtype, device='meta')\n"
        "floats = empty(99, dtype=torch.float32)\n"
        "tables = SamplingTables(temperature=floats, top_k=empty(99), top_p=floats,\n"
        "                        min_p=floats, seed=empty(99, dtype=torch.int64))\n"
        "last = empty(99, dtype=torch.int64)\n"
        "for size in (1, 7, 64, 100):\n"
        "    logits = empty(size, 151936, dtype=torch.bfloat16)\n"
        "    sample_tokens(logits, empty(size), empty(size), tables, last,\n"
        "                  features=Features(arch='sm_90'))\n",
    )
    assert len({kernel["assembly"] for kernel in compiled}) == 3
    blocks, rows = compiled[:2]
    assert ".v4" in blocks["assembly"]
    assert blocks["stack"] == rows["stack"] == 0
    assert "atom" not in rows["assembly"]
