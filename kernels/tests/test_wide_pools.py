# SPDX-License-Identifier: Apache-2.0
"""Slots that an offset of 32 bits does not reach: written and read as those before it."""

from __future__ import annotations

import pytest
import torch
from kernels.tests.offline import compile_launches

from bedplate.reference.rope import HeadNorm
from bedplate_triton.decode_attention import decode_attention
from bedplate_triton.extend_attention import extend_attention
from bedplate_triton.features import Features
from bedplate_triton.kv_write import write_kv
from bedplate_triton.rope import qk_norm_rope_write

FEATURES = Features(cores=4)
HEADS, SIZE, LENGTH = 2, 16, 40
NUMBERS_A_SLOT = HEADS * 2 * SIZE
FAR = (1 << 31) // NUMBERS_A_SLOT
"""The first slot whose numbers begin where 32 bits end."""


@pytest.fixture(scope="module")
def pools(device):
    """Keys and values side by side; what is not written is never touched, and costs nothing."""

    def make(slots):
        shape = (slots, HEADS, 2 * SIZE)
        return torch.empty(shape, dtype=torch.float8_e5m2, device=device).split(SIZE, dim=-1)

    return {0: make(2 * LENGTH), FAR: make(FAR + 2 * LENGTH)}


@pytest.fixture
def rows(device):
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn((LENGTH, HEADS, SIZE), generator=generator).to(device, torch.bfloat16)
        for _ in range(3)
    ]


def slots_from(first, device):
    """Every other slot, last one first."""
    return (first + 1 + 2 * torch.arange(LENGTH - 1, -1, -1)).int().to(device)


def writes(_q, k, v, slots, keys, values):
    write_kv(k, v, slots, keys, values, features=FEATURES)
    return [pool[slots.long()].float() for pool in (keys, values)]


def writes_of_heads(q, k, v, slots, keys, values):
    qk_norm_rope_write(
        q.clone(), k.clone(), v.clone(), positions=slots * 0, rope=None,
        norm=HeadNorm(q_weight=None, k_weight=None, eps=1e-6, order="no_weight", flat=False),
        keys=keys, values=values, slots=slots, features=FEATURES,
    )  # fmt: skip
    return [pool[slots.long()].float() for pool in (keys, values)]


def decodes(q, k, v, slots, keys, values):
    write_kv(k, v, slots, keys, values, features=FEATURES)
    out = torch.empty_like(q[:1])
    sums = torch.empty((1, HEADS, 1), device=q.device)
    decode_attention(
        q[:1], keys, values, **table_of(slots), out=out, partial=sums, lse=sums,
        features=FEATURES, scale=0.25,
    )  # fmt: skip
    return [out]


def extends(q, k, v, slots, keys, values):
    write_kv(k, v, slots, keys, values, features=FEATURES)
    out, table = torch.empty_like(q), table_of(slots)
    extend_attention(
        q, keys, values, **table, start_loc=table["rows"] * 0, extend_lens=table["seq_lens"],
        out=out, features=FEATURES, max_extend_len=LENGTH, scale=0.25,
    )  # fmt: skip
    return [out]


def table_of(slots):
    def number(value):
        return torch.tensor([value], dtype=torch.int32, device=slots.device)

    return {"req_to_token": slots[None], "rows": number(0), "seq_lens": number(LENGTH)}


@pytest.mark.parametrize("use", [writes, writes_of_heads, decodes, extends])
def test_the_same_as_at_the_beginning(use, pools, rows, device):
    near, far = (use(*rows, slots_from(first, device), *pools[first]) for first in (0, FAR))
    for here, there in zip(near, far, strict=True):
        assert here.isfinite().all()
        assert here.abs().sum() > 0
        assert torch.equal(here, there)


WRITE = (
    "from bedplate_triton.features import Features\n"
    "def write(slots):\n"
    "    def rows(count):\n"
    "        return torch.empty(count, 8, 128, dtype=torch.bfloat16, device='meta')\n"
    "    pools, new = [rows(slots), rows(slots)], [rows(64), rows(64)]\n"
    "    where = torch.empty(64, dtype=torch.int32, device='meta')\n"
    "    write_kv(*new, where, *pools, features=Features())\n"
    "import torch\n"
    "write(1 << 10)\n"
    "write(3 << 20)\n"
)


def test_a_write_is_compiled_as_such():
    """An offset of 32 bits does not reach all of it; what a small pool compiles to would."""
    small, wide = compile_launches("bedplate_triton.kv_write", WRITE, arch="gfx942")
    assert "buffer_store" in small["assembly"]
    assert "buffer_store" not in wide["assembly"]
    assert "global_store" in wide["assembly"]


ATTEND = """
import torch
from kernels.matrix.targets import find
features = find("gfx942").features()
for least in (0, LARGE_POOL):
    case = make_case(
        "", MODELS["32/8/128"], lengths=(64,), page=16, least_bytes=least, SPECIAL
    )
    case.run(case.make(torch.device("meta"), 0), features)
"""


@pytest.mark.parametrize(
    ("op", "special"), [("decode_attention", "splits=1"), ("extend_attention", "fresh=(64,)")]
)
def test_attention_is_compiled_as_such(op, special):
    """Keys and values are asked for by whole addresses; queries and slots need not be."""
    code = ATTEND.replace("SPECIAL", special)
    small, wide = compile_launches(f"bedplate_triton.cases.{op}", code, arch="gfx942")
    loads = [each["assembly"].count("buffer_load") for each in (small, wide)]
    assert loads[1] < loads[0] / 2
    assert wide["assembly"].count("global_load") > small["assembly"].count("global_load")
