# SPDX-License-Identifier: Apache-2.0
"""Decode attention: what its cases cannot say, which is every split, both merges and replay."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.tests.offline import compile_launches

from bedplate.errors import ContractError, UnsupportedError
from bedplate_triton import configs
from bedplate_triton.cases import relative_error
from bedplate_triton.cases.decode_attention import CALLS, make_case
from bedplate_triton.decode_attention import choose_splits
from bedplate_triton.features import Features
from bedplate_triton.sizes import column_blocks

FEATURES = Features(cores=4, shared_bytes=96 << 10)
SMALL = {"BLOCK_N": 16, "tokens_a_split": 16, "merge_rows": 2, "merge_columns": 16}


@pytest.fixture
def configured():
    """Overrides values of the configuration."""
    with ExitStack() as stack:
        yield lambda **values: stack.enter_context(
            configs.override("decode_attention", **values)
        )


def check(case, device):
    """Equals the reference twice, and leaves its counters as it found them."""
    inputs = case.make(device, 3)
    (want,) = case.reference(inputs)
    for _ in range(2):
        (got,) = case.run(inputs, FEATURES)
        assert relative_error(got, want) <= case.tolerance
        assert not inputs["options"]["counters"].any()
    for request, length in enumerate(inputs["lengths"]):
        assert length or not got[request].any()


@pytest.mark.parametrize(
    "name", ["forty a key", "odd sizes", "window", "chunk", "sinks and window", "latent"]
)
def test_the_last_program_merges(name, device, configured):
    """Cases have the other form of merge."""
    configured(**SMALL, merge="last")
    check(make_case("", CALLS[name], lengths=(70, 0), dtype=torch.float32), device)


@pytest.mark.parametrize(("merge", "splits"), [("kernel", 9), ("last", 2), ("last", 9)])
def test_splits_and_merges(merge, splits, device, configured):
    """Requests of one split and of many, some splits empty; more splits than merge at once."""
    configured(**SMALL, merge=merge, merge_tile=2 * 16 * 2)
    facts = {"lengths": (129, 0, 17), "splits": splits, "dtype": torch.float32}
    check(make_case("", CALLS["plain"], **facts), device)


@pytest.mark.parametrize("name", ["plain", "window", "chunk", "sinks and window", "latent"])
def test_lengths_that_are_settled_before_the_queries(name, device, configured):
    """Read at another place, the same is computed."""
    case = make_case("", CALLS[name], lengths=(70, 0, 33), splits=3, dtype=torch.float32)
    inputs = case.make(device, 3)
    configured(**SMALL)
    (want,) = case.run(inputs, FEATURES)
    configured(settled=True)
    (got,) = case.run(inputs, FEATURES)
    assert torch.equal(got, want)


def test_multi_head_latent_sizes(device, configured):
    """576 and 512: two products a tile of keys, values that are the keys, blocks of heads."""
    call = replace(
        CALLS["latent"], num_heads=20, head_dim=576, value_dim=512, scale=0.04
    )  # fmt: skip
    configured(merge="last", BLOCK_G=16, tokens_a_split=32)
    check(make_case("", call, lengths=(70,), splits=2), device)


def test_a_cache_of_another_dtype(device):
    """Narrow floats are widened to the dtype of the queries."""
    check(make_case("", CALLS["plain"], kv_dtype=torch.float8_e4m3fn), device)


def test_without_counters_a_kernel_merges(device, configured):
    configured(merge="last")
    case = make_case("", CALLS["plain"], lengths=(300,), splits=2)
    inputs = case.make(device, 0)
    inputs["options"]["counters"] = None
    assert relative_error(case.run(inputs, FEATURES)[0], case.reference(inputs)[0]) < 1e-2


def splits_of(batch, context, *, cores=132, **call):
    facts = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "value_dim": 128} | call
    return choose_splits(
        Features(cores=cores),
        batch_size=batch,
        kv_dtype=torch.bfloat16,
        max_context_len=context,
        **facts,
    )


@given(
    batch=st.integers(1, 512),
    heads=st.integers(1, 128),
    context=st.integers(1, 1 << 20),
    cores=st.integers(1, 256),
)
def test_splits_fill_the_cores_and_no_more(batch, heads, context, cores):
    splits = splits_of(batch, context, cores=cores, num_heads=heads, num_kv_heads=heads)
    chosen = configs.choose(
        "decode_attention", Features(), head_dim=128, value_dim=128, group=1, kv_bytes=2,
        batch=batch,
    )  # fmt: skip
    assert 1 <= splits <= chosen["most_splits"]
    assert splits == 1 or splits * chosen["tokens_a_split"] <= context
    assert splits == 1 or splits * batch * heads <= chosen["programs_a_core"] * cores
    assert splits <= splits_of(
        batch, 2 * context, cores=cores, num_heads=heads, num_kv_heads=heads
    )


@pytest.mark.parametrize(
    ("batch", "context", "splits"),
    [(1, 4096, 32), (1, 32768, 64), (16, 4096, 4), (64, 4096, 1)],
)
def test_splits_with_eight_heads_on_132_cores(batch, context, splits):
    assert splits_of(batch, context) == splits


@pytest.mark.parametrize("size", [1, 16, 24, 40, 64, 80, 96, 128, 192, 256, 384, 576])
def test_blocks_cover_every_column_with_powers_of_two(size):
    main, tail = column_blocks(size)
    assert all(block >= 16 and block & (block - 1) == 0 for block in (main, tail) if block)
    assert size <= main + tail < max(32, 2 * size)
    assert tail < main


@pytest.mark.parametrize("sizes", [(577, 64), (64, 513)])
def test_refuses_larger_heads(sizes, device):
    call = replace(CALLS["plain"], head_dim=sizes[0], value_dim=sizes[1])
    case = make_case("", call, lengths=(1,))
    with pytest.raises(UnsupportedError, match="choose another attention"):
        case.run(case.make(device, 0), FEATURES)


def test_refuses_an_unknown_merge(device, configured):
    configured(merge="later")
    case = make_case("", CALLS["plain"], lengths=(1,))
    with pytest.raises(ContractError, match="known: kernel, last"):
        case.run(case.make(device, 0), FEATURES)


LAUNCHES = """
import torch
from bedplate_triton.features import Features
from bedplate_triton.sizes import column_blocks

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

def launch(batch, splits, heads=32, kv_heads=8, size=128, dtype=torch.bfloat16, **options):
    q = empty(batch, heads, size, dtype=dtype)
    keys, values = empty(2, 5000, kv_heads, size, dtype=dtype)
    table, ints = empty(9, 4096, dtype=torch.int32), empty(batch, dtype=torch.int32)
    if batch == 3:  # as parts of one transfer lie, anywhere
        ints = torch.zeros(batch + 1, dtype=torch.int32)[1:]
    partial, lse = empty(batch, heads, splits, size), empty(batch, heads, splits)
    decode_attention(
        q, keys, values, table, ints, ints, q, partial, lse, scale=1.0,
        features=Features(arch="sm_90"), **options
    )

for batch, splits in ((1, 16), (2, 9), (3, 15), (4, 16)):
    launch(batch, splits)
with configs.override("decode_attention", merge="last"):
    for batch, splits in ((1, 64), (2, 3)):
        launch(batch, splits, counters=empty(64, dtype=torch.int32))
launch(4, 4, heads=8, kv_heads=4, size=256, chunk=8192)
launch(4, 1, size=80, dtype=torch.float32)
"""


def test_one_binary_for_every_number_of_splits_and_batch_of_a_class():
    """And an arrival that comes after what it announces, read past the core's own cache."""
    compiled = compile_launches("bedplate_triton.decode_attention", LAUNCHES)
    code = [facts["assembly"] for facts in compiled]
    made = [facts["compile"] for facts in compiled]
    assert len(set(made[:8])) == 2  # split and merge, four times
    assert made[8] == made[9]
    before, _, after = code[8].partition("atom.global.gpu.acq_rel.add")
    assert after
    assert "bar.sync" in before[before.rindex("st.global") :]
    assert "ld.global.cg" in after
    assert all(facts["stack"] == 0 for facts in compiled)
    products = ["mma.sync" in text for text in code[10:]]
    assert products == [True, False, False]  # of 256, its merge; float32 stays exact


def test_a_chained_kernel_reads_lengths_and_slots_before_it_waits():
    compiled = compile_launches(
        "bedplate_triton.decode_attention",
        "import torch\n"
        "from bedplate_cuda.ops import with_chain\n"
        "from bedplate_triton.features import Features\n"
        "features = with_chain(Features(arch='sm_90', cores=132, shared_bytes=227 << 10))\n"
        "of = lambda dtype: lambda *shape: torch.empty(shape, dtype=dtype, device='meta')\n"
        "count, half, wide = of(torch.int32), of(torch.bfloat16), of(torch.float32)\n"
        "pool, q = half(999, 8, 128), half(1, 32, 128)\n"
        "with configs.override('decode_attention', settled=True):\n"
        "    decode_attention(q, pool, half(999, 8, 128), count(8, 999), count(1), count(1),\n"
        "                     half(1, 32, 128), wide(1, 32, 2, 128), wide(1, 32, 2),\n"
        "                     scale=0.1, features=features)",
    )
    for kernel in compiled:
        before, _, after = kernel["assembly"].partition("griddepcontrol.wait")
        assert ("ld.global" in before) == (kernel["kernel"] == "_split_kernel")
        assert "st.global" not in before
        assert "ld.global" in after
