# SPDX-License-Identifier: Apache-2.0
"""Extend attention: what its cases cannot say, which is small tiles, order and equal bits."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from kernels.tests.offline import compile_launches

from bedplate_triton import configs
from bedplate_triton.cases import relative_error
from bedplate_triton.cases.decode_attention import call_options, draw, paged_cache
from bedplate_triton.cases.extend_attention import CALLS, make_case
from bedplate_triton.extend_attention import extend_attention, supports
from bedplate_triton.features import Features

FEATURES = Features(cores=4, shared_bytes=96 << 10)
PLAIN = CALLS["plain"]


@pytest.fixture
def configured():
    """Overrides values of the configuration."""
    with ExitStack() as stack:
        yield lambda **values: stack.enter_context(
            configs.override("extend_attention", **values)
        )


def check(case, device):
    inputs = case.make(device, 5)
    for got, want in zip(case.run(inputs, FEATURES), case.reference(inputs), strict=True):
        assert relative_error(got, want) <= case.tolerance


@pytest.mark.parametrize(
    "name",
    ["plain", "eight a key", "odd sizes", "window", "window in a chunk", "softcap", "sinks",
     "both ways in a chunk", "latent"],
)  # fmt: skip
def test_small_tiles_give_the_same(name, device, configured):
    """Small tiles pass through masked, free and masked blocks at short lengths."""
    configured(BLOCK_M=16, BLOCK_N=16)
    facts = {"lengths": (70, 3, 9), "fresh": (19, 3, 0), "dtype": torch.float32}
    check(make_case("", CALLS[name], **facts), device)


def test_multi_head_latent_sizes(device):
    """576 and 512: two products a tile of keys, and values that are the keys."""
    call = replace(CALLS["latent"], num_heads=6, head_dim=576, value_dim=512, scale=0.04)
    check(make_case("", call, lengths=(70,), fresh=(9,)), device)


def test_a_cache_of_another_dtype(device):
    """Narrow floats are widened to the dtype of the queries."""
    case = make_case("", PLAIN, lengths=(70,), fresh=(9,), kv_dtype=torch.float8_e4m3fn)
    check(case, device)


class Requests:
    """A cache with two requests of 90 tokens, and queries of every token of both.

    Args:
        call: What is attended with.
        device: Where.
        dtype: Of queries and cache.
    """

    length = 90

    def __init__(self, call, device, dtype=torch.bfloat16):
        lengths = (self.length, self.length)
        self.cache = paged_cache(device, 2, call, lengths, dtype, 4)
        self.call, self.options = call, call_options(device, 2, call)
        shape = (2, self.length, call.num_heads, call.head_dim)
        self.q = draw(device, 1, shape, dtype)

    def attend(self, *parts, spare=0, **options):
        """Results of the tokens ``[start, stop)`` of requests, given as triples; a list.

        NaN rows stand behind those of the last part.
        """
        device = self.q.device
        counts = torch.tensor([stop - start for _, start, stop in parts])
        q = torch.cat([self.q[request, start:stop] for request, start, stop in parts])
        shape = (len(q) + spare, self.call.num_heads, self.call.value_dim)
        out = torch.full(shape, float("nan"), dtype=q.dtype, device=device)
        ints = [
            torch.tensor([request + 1 for request, _, _ in parts]),
            torch.tensor([stop for _, _, stop in parts]),
            counts.cumsum(0) - counts,
            counts,
        ]
        extend_attention(
            q,
            self.cache["k_pool"],
            self.cache["v_pool"],
            self.cache["req_to_token"],
            *(each.int().to(device) for each in ints),
            out,
            **{
                "features": FEATURES,
                "max_extend_len": int(counts.max()),
                "causal": self.call.causal,
                **self.options,
                **options,
            },
        )
        sizes = counts.tolist()
        sizes[-1] += spare
        return out.split(sizes)


BITS = {name: CALLS[name] for name in ("plain", "latent")}
BITS["sinks and window"] = replace(CALLS["sinks and window"], window=23)


@pytest.mark.parametrize("call", BITS.values(), ids=BITS.keys())
def test_invariant_rows_have_the_same_bits_in_every_pass(call, device, configured):
    """A whole prompt, chunks of it, single tokens, and company of other lengths."""
    configured(BLOCK_M=32, BLOCK_N=16)
    requests = Requests(call, device)
    end = requests.length
    (whole,) = requests.attend((0, 0, end), invariant=True)
    assert not whole.isnan().any()
    passes = [
        [(0, 0, 21), (1, 0, end)],
        [(1, 3, 4), (0, 21, 63)],
        [(0, 63, end)],
        *([(0, at, at + 1), (1, 0, at % 7 + 1)] for at in (0, 16, end - 1)),
    ]
    for parts in passes:
        for (request, start, stop), got in zip(
            parts, requests.attend(*parts, invariant=True, max_extend_len=end), strict=True
        ):
            if request == 0:
                assert torch.equal(got, whole[start:stop])


@pytest.mark.parametrize("invariant", [False, True])
def test_rows_that_nobody_owns_stay_as_they_are(invariant, device):
    requests = Requests(PLAIN, device)
    (got,) = requests.attend((0, 50, 57), spare=3, invariant=invariant)
    assert not got[:7].isnan().any()
    assert got[7:].isnan().all()
    (got,) = requests.attend((0, 50, 50), spare=3, max_extend_len=9, invariant=invariant)
    assert got.isnan().all()


def test_the_last_rows_start_first(device, configured):
    """A grid that is too short leaves out the first tokens, which see the fewest keys."""
    configured(BLOCK_M=16)
    tokens = 16 // (PLAIN.num_heads // PLAIN.num_kv_heads)
    (got,) = Requests(PLAIN, device).attend((0, 0, 90), max_extend_len=tokens)
    written = ~got.isnan().flatten(1).any(1)
    assert written[-1]
    assert not written[: 90 - 2 * tokens].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(16, 16), (80, 80), (128, 128), (256, 256), (576, 512)])
def test_supports_the_sizes_that_it_tiles(sizes, dtype):
    assert supports(*sizes, dtype)


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"),
    [
        ((577, 512), torch.bfloat16, "exceed 576 and 512"),
        ((576, 513), torch.float16, "exceed 576 and 512"),
        ((257, 64), torch.float32, "exceed 256 and 256"),
        ((64, 64), torch.float64, "not torch.float64"),
    ],
)
def test_refuses_with_a_reason(sizes, dtype, reason):
    verdict = supports(*sizes, dtype)
    assert not verdict
    assert reason in verdict.reason


LAUNCHES = """
import torch
from bedplate_triton.features import Features

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

def launch(longest, tokens=64, batch=4, heads=32, kv_heads=8, size=128, latent=0,
           dtype=torch.bfloat16, skew=0, **options):
    q = empty(tokens, heads, size, dtype=dtype)
    out = empty(tokens, heads, latent or size, dtype=dtype)
    keys, values = empty(2, 5000, kv_heads, size, dtype=dtype)
    values = keys[..., :latent] if latent else values
    table, ints = empty(9, 4096, dtype=torch.int32), empty(batch, dtype=torch.int32)
    if skew:  # as parts of one transfer lie, anywhere
        ints = torch.zeros(batch + skew, dtype=torch.int32)[skew:]
    extend_attention(
        q, keys, values, table, ints, ints, ints, ints, out, max_extend_len=longest, scale=1.0,
        features=Features(arch="sm_90", shared_bytes=227 << 10), **options
    )

for passes in ((1024, 1024, 1), (777, 777, 1), (1000, 1016, 16)):
    launch(*passes)
launch(777, 2048, 3, skew=1)
launch(1024, 2048, 65)
for longest in (1, 16, 4096):
    launch(longest, invariant=True)
launch(64, heads=128, kv_heads=1, size=576, latent=512)
launch(64, size=80, dtype=torch.float32)
"""


def test_one_binary_for_every_length():
    """Within a class of lengths, of one and of several; for all where bits must not differ."""
    compiled = compile_launches("bedplate_triton.extend_attention", LAUNCHES)
    made = [facts["compile"] for facts in compiled]
    assert made[0] == made[1]
    assert made[2] == made[3] == made[4]
    assert made[5] == made[6] == made[7]
    assert max(facts["shared"] for facts in compiled) <= 227 * 1024
    budget = [0] * 8 + [128, 0]  # the widest tiles may spill a little
    assert all(facts["stack"] <= most for facts, most in zip(compiled, budget, strict=True))
    products = ["wgmma" in facts["assembly"] for facts in compiled]
    assert products == [True] * 9 + [False]  # float32 stays exact
