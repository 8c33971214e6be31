# SPDX-License-Identifier: Apache-2.0
"""Layer A: every call of ``ops`` against the real operator schemas, in plain torch.

The operators are defined from the copied schemas and computed by the bodies of the simulators,
so the dispatcher refuses a wrong keyword or type as it would on a device.
"""

from __future__ import annotations

import ast
import inspect
import json

import pytest
import torch
from backends.npu.tests.simulated.bodies import BODIES
from backends.npu.tests.simulated.schemas import define, read

from bedplate.contract import OpRequest
from bedplate.errors import ContractError
from bedplate.reference import ops as reference
from bedplate.reference.rope import HeadNorm, RopeTable, qk_norm_rope_write
from bedplate.registry.decisions import DecisionLog
from bedplate.registry.ops import Operations
from bedplate_npu import ops

MASK = torch.ones(2048, 2048, dtype=torch.int8).triu_(1)
SCHEMAS = read()


def defined(changes=None):
    """The operators, as long as the result is kept."""
    library = define(changes=changes)
    for name, body in BODIES.items():
        library.impl(name, _with_defaults(name, body), "CPU")
    return library


def _with_defaults(name, body):
    arguments = torch._C.parse_schema(SCHEMAS[name]).arguments

    def call(*args, **kwargs):
        given = {a.name: a.default_value for a in arguments} | kwargs
        given |= {a.name: value for a, value in zip(arguments, args, strict=False)}
        positional = [given.pop(a.name) for a in arguments if not a.kwarg_only]
        return body(*positional, **given)

    return call


@pytest.fixture
def operators():
    library = defined()
    yield
    library._destroy()


def randn(*shape, seed=0):
    chance = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=chance).to(torch.bfloat16)


def table(*rows):
    return torch.tensor(rows, dtype=torch.int32)


def packed(**changes):
    """A right call of attention over pages, with some arguments changed."""
    arguments = {
        "query": randn(7, 4, 64), "key": randn(5, 128, 128), "value": randn(5, 128, 128),
        "layout": "TND", "num_heads": 4, "num_kv_heads": 2, "scale": 0.1, "q_lens": [3, 7],
        "kv_lens": [90, 200], "block_table": table([1, 0], [2, 3]), "sparse_mode": 3,
        "mask": MASK,
    }  # fmt: skip
    return call(arguments | changes)


def single(**changes):
    """A right call for one query token a sequence."""
    arguments = {
        "query": randn(2, 1, 256), "key": randn(5, 128, 128), "value": randn(5, 128, 128),
        "layout": "BSH", "num_heads": 4, "num_kv_heads": 2, "scale": 0.1,
        "kv_lens": [90, 200], "block_table": table([1, 0], [2, 3]),
    }  # fmt: skip
    return call(arguments | changes)


def latent(**changes):
    arguments = {
        "query": randn(2, 1, 4, 512), "key": randn(5, 128, 512), "value": randn(5, 128, 512),
        "layout": "BSND", "num_heads": 4, "num_kv_heads": 1, "scale": 0.1,
        "kv_lens": [90, 200], "block_table": table([1, 0], [2, 3]),
        "query_rope": randn(2, 1, 4, 64), "key_rope": randn(5, 128, 64),
    }  # fmt: skip
    return call(arguments | changes)


def call(arguments):
    operands = [arguments.pop(name) for name in ("query", "key", "value")]
    return ops.fused_infer_attention(*operands, **arguments)


def fresh(**changes):
    lens = {"kv_lens": [3, 7], "block_table": None}
    return packed(key=randn(7, 2, 64), value=randn(7, 2, 64), **(lens | changes))


RIGHT = {
    "packed over pages": packed,
    "packed over fresh keys": fresh,
    "a band": lambda: packed(sparse_mode=4, window=70),
    "sinks": lambda: packed(sinks=randn(4)),
    "one token": single,
    "one token with a mask": lambda: single(mask=torch.zeros(2, 1, 1, 256, dtype=torch.bool)),
    "latents": latent,
    "one sequence": lambda: call({
        "query": randn(1, 5, 4, 80), "key": randn(5, 128, 160), "value": randn(5, 128, 160),
        "layout": "BSND", "num_heads": 4, "num_kv_heads": 2, "scale": 0.1, "kv_lens": [90],
        "block_table": table([1, 0]), "sparse_mode": 3, "mask": MASK,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_right_calls_pass(operators, name):
    assert RIGHT[name]().isfinite().all()


WRONG = {
    "unknown layout": (packed, {"layout": "NTD"}, "layout NTD"),
    "rank": (packed, {"query": randn(7, 256)}, "2 dimensions is not TND"),
    "query by columns": (packed, {"query": randn(4, 7, 64).transpose(0, 1)}, "not contiguous"),
    "float32": (packed, {"query": randn(7, 4, 64).float()}, "float32"),
    "keys of another dtype": (packed, {"key": randn(5, 128, 128).half()}, "key is torch"),
    "heads that do not divide": (packed, {"num_kv_heads": 3}, "4 query heads over 3"),
    "no key heads": (packed, {"num_kv_heads": 0}, "0 key heads"),
    "device lengths": (packed, {"kv_lens": [*torch.tensor([90, 200])]}, "host integers"),
    "no lengths": (packed, {"kv_lens": None}, "both length lists"),
    "not cumulative": (packed, {"q_lens": [7, 7]}, "not cumulative"),
    "last is not T": (packed, {"q_lens": [3, 6]}, "end at 6, but there are 7 tokens"),
    "other number": (packed, {"kv_lens": [90]}, "2 query and 1 key lengths"),
    "fresh keys too few": (fresh, {"kv_lens": [3, 6]}, "key lengths end at 6"),
    "table of int64": (packed, {"block_table": table([1, 0], [2, 3]).long()}, "not int32"),
    "table in columns": (packed, {"block_table": table([1, 2], [0, 3]).T}, "contiguous"),
    "pages of 16": (packed, {"key": randn(40, 16, 128)}, "not [P, 128, K·D]"),
    "pages of four dimensions": (packed, {"key": randn(5, 128, 2, 64)}, "not [P, 128, K·D]"),
    "pages without lengths": (single, {"kv_lens": None}, "pages need key lengths"),
    "rows missing": (single, {"block_table": table([1, 0])}, "1 rows for 2 sequences"),
    "length of nothing": (single, {"kv_lens": [0, 5]}, "below 1"),
    "table too narrow": (single, {"kv_lens": [90, 257]}, "257 tokens, but the block"),
    "no pages": (single, {"block_table": None}, "used with pages only"),
    "query lengths": (single, {"q_lens": [1, 2]}, "takes no query lengths"),
    "band without window": (packed, {"sparse_mode": 4}, "a band is mode 4"),
    "window without band": (packed, {"window": 9}, "a band is mode 4"),
    "no mask": (packed, {"mask": None}, "needs a mask"),
    "small mask": (packed, {"mask": MASK[:128, :128]}, "needs a mask of 2048"),
    "mask of floats": (packed, {"mask": MASK.bfloat16()}, "the mask is torch.bfloat16"),
    "causal with one token": (single, {"sparse_mode": 3, "mask": MASK}, "ignores sparse"),
    "mode 1": (packed, {"sparse_mode": 1}, "mode 1 is not used"),
    "mask of another width": (
        single, {"mask": torch.zeros(2, 1, 1, 128, dtype=torch.bool)}, "[2, 1, 1, 256]",
    ),
    "packed without causality": (packed, {"sparse_mode": 0, "mask": None}, "causal mask"),
    "heads of 80": (packed, {"query": randn(7, 4, 80), "key": randn(5, 128, 160),
                             "value": randn(5, 128, 160)}, "no packed form"),
    "fresh heads of 80": (fresh, {"query": randn(7, 4, 80), "key": randn(7, 2, 80),
                                  "value": randn(7, 2, 80)}, "no packed form"),
    "heads of 520": (single, {"query": randn(2, 1, 2080), "key": randn(5, 128, 1040),
                              "value": randn(5, 128, 1040)}, "heads of 520"),
    "half of a latent": (latent, {"key_rope": None}, "one of two rotated parts"),
    "small latent": (latent, {"query": randn(2, 1, 4, 256)}, "not 512 and 64"),
    "three latent heads": (latent, {"num_heads": 3, "query": randn(2, 1, 3, 512)}, "power of"),
    "every second head": (latent, {"query_rope": randn(2, 1, 8, 64)[:, :, ::2]}, "contiguous"),
}  # fmt: skip


def fixed(make, changes):
    if make is fresh:
        lens = {"kv_lens": [3, 7], "block_table": None, "key": randn(7, 2, 64),
                "value": randn(7, 2, 64)}  # fmt: skip
        return packed(**(lens | changes))
    return make(**changes)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_are_refused_on_the_host(operators, name):
    make, changes, part = WRONG[name]
    with pytest.raises(ContractError) as caught:
        fixed(make, changes)
    assert part in caught.value.message
    assert "Report it" in caught.value.message


def test_attention_is_the_references(operators):
    from bedplate.reference.attention import attend, visible
    from bedplate_npu.selftest import call_of

    query, key, value = randn(7, 4, 64), randn(7, 2, 64), randn(7, 2, 64)
    got = packed(query=query, key=key, value=value, kv_lens=[3, 7], block_table=None)
    for rows in (slice(0, 3), slice(3, 7)):
        at = torch.arange(rows.stop - rows.start)
        spec = call_of(scale=0.1)
        want = attend(query[rows], key[rows], value[rows], visible(at, at, spec), spec, None)
        torch.testing.assert_close(got[rows], want, rtol=2e-2, atol=2e-2)


def pools():
    return [torch.zeros(3, 128, 2, 64, dtype=torch.bfloat16) for _ in range(2)]


def test_keys_and_values_are_stored(operators):
    key, value, (keys, values) = randn(3, 2, 64), randn(3, 2, 64, seed=1), pools()
    slots = torch.tensor([130, 0, 0], dtype=torch.int32)  # padding twice
    ops.store_kv(key, value, key_cache=keys, value_cache=values, slots=slots)
    assert torch.equal(keys.view(-1, 2, 64)[130], key[0])
    assert torch.equal(values.view(-1, 2, 64)[130], value[0])
    assert keys[0].abs().sum(dim=(1, 2)).nonzero().flatten().tolist() == [1, 2]
    assert not keys[2].any()


WRONG_STORES = {
    "slots of int64": ({"slots": torch.tensor([1, 2, 3])}, "not a row of int32"),
    "pages of 16": ({"key_cache": torch.zeros(3, 16, 2, 64)}, "not contiguous pages of 128"),
    "other heads": ({"key": randn(3, 1, 64)}, "for 3 slots of [2, 64]"),
    "other dtype": ({"value": randn(3, 2, 64).float()}, "value is torch.float32"),
    "too few": ({"key": randn(2, 2, 64)}, "key is [2, 2, 64] for 3 slots"),
}


@pytest.mark.parametrize("name", WRONG_STORES)
def test_wrong_stores_are_refused(operators, name):
    changes, part = WRONG_STORES[name]
    keys, values = pools()
    arguments = {
        "key": randn(3, 2, 64), "value": randn(3, 2, 64), "key_cache": keys,
        "value_cache": values, "slots": torch.tensor([130, 1, 2], dtype=torch.int32),
    } | changes  # fmt: skip
    with pytest.raises(ContractError) as caught:
        ops.store_kv(arguments.pop("key"), arguments.pop("value"), **arguments)
    assert part in caught.value.message


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", reference.RMS_NORM_ORDERS)
def test_norms_round_as_their_order_says(operators, order, dtype):
    x, other = (randn(5, 64, seed=n).to(dtype) for n in range(2))
    weight = None if order == "no_weight" else randn(64).to(dtype)
    norm = (weight, 1e-5, order)
    assert torch.equal(ops.rms_norm(x, *norm), reference.rms_norm(x, *norm))
    for residual in (other, None):
        pair = ops.add_norm(x, residual, weight, None, 1e-5, order)
        wanted = reference.add_norm(x, residual, weight, None, 1e-5, order)
        assert all(torch.equal(got, want) for got, want in zip(pair, wanted, strict=True))


def test_a_product_in_parts_is_added_up(operators):
    x, weight = randn(5, 64), randn(64)
    whole = reference.PartialProduct(parts=x.float()[None], bias=None, dtype=x.dtype)
    assert torch.equal(ops.add_norm(whole, None, weight, None, 1e-5, "weight_fp32")[1], x)


HEADS = {
    "stepwise": {},
    "rounded once": {"stepwise": False},
    "angles wider than heads": {"stepwise": False, "angles": torch.float32},
    "normed": {"order": "weight_fp32"},
    "one norm of all heads": {"order": "weight_after_cast", "flat": True},
}


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_round_as_the_operation_does(operators, name, style):
    how = {"stepwise": True, "angles": torch.bfloat16, "order": "", "flat": False} | HEADS[name]
    angles = torch.randn(9, 16, generator=torch.Generator().manual_seed(5)).to(how["angles"])
    rope = RopeTable(cos=angles.cos(), sin=angles.sin(), style=style, stepwise=how["stepwise"])
    norm = None
    if how["order"]:
        sizes = (256, 128) if how["flat"] else (64, 64)
        q_weight, k_weight = (randn(size, seed=n) for n, size in enumerate(sizes))
        norm = HeadNorm(
            q_weight=q_weight, k_weight=k_weight, eps=1e-5, order=how["order"],
            flat=how["flat"],
        )  # fmt: skip
    ours, theirs = ([randn(3, 4, 64), randn(3, 2, 64), randn(3, 2, 64)] for _ in range(2))
    at = torch.tensor([8, 2, 5])
    ops.qk_norm_rope_write(*ours, at, rope, norm)
    qk_norm_rope_write(*theirs, at, rope, norm)
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("cache", DTYPES)
def test_heads_are_written_in_the_dtype_of_the_cache(operators, cache):
    heads = randn(3, 4, 64), randn(3, 2, 64), randn(3, 2, 64)
    slots, at = torch.tensor([130, 7, 200]), torch.tensor([8, 2, 5])
    pools, wanted = ([torch.zeros(256, 2, 64, dtype=cache) for _ in range(2)] for _ in range(2))
    ops.qk_norm_rope_write(*heads, at, None, None, *pools, slots)
    qk_norm_rope_write(*heads, at, None, None, *wanted, slots)
    assert all(torch.equal(got, want) for got, want in zip(pools, wanted, strict=True))


def test_gate(operators):
    """Rounded once, so it is the operation in float32 only."""
    x = randn(5, 64).float()
    assert torch.equal(ops.act_and_mul(x, "silu"), reference.act_and_mul(x, "silu"))
    with pytest.raises(ContractError, match="computes silu, not gelu"):
        ops.act_and_mul(x, "gelu")


SUPPORTED = [
    ("rms_norm", "bfloat16", {"order": "weight_after_cast"}, "npu"),
    ("rms_norm", "float32", {"order": "weight_fp32"}, "npu"),
    ("rms_norm", "float64", {"order": "weight_fp32"}, "reference"),
    ("rms_norm", "bfloat16", {"order": "no_weight"}, "npu"),
    ("add_norm", "bfloat16", {"order": "layer_norm"}, "reference"),
    ("act_and_mul", "float32", {"act": "silu"}, "npu"),
    ("act_and_mul", "bfloat16", {"act": "silu"}, "reference"),
    ("act_and_mul", "float32", {"act": "gelu"}, "reference"),
    ("qk_norm_rope_write", "float16", {"norm": ""}, "npu"),
    ("qk_norm_rope_write", "float16", {"norm": "layer_norm"}, "reference"),
    ("qk_norm_rope_write", "float16", {"norm": "weight_fp32", "flat": True}, "npu"),
    ("linear", "bfloat16", {}, "reference"),
]


@pytest.mark.parametrize(("op", "dtype", "attributes", "provider"), SUPPORTED)
def test_what_is_offered(op, dtype, attributes, provider):
    registry = Operations(reference.OPERATIONS, DecisionLog(), "npu", "none")
    ops.register(registry)
    chosen = registry.choose(OpRequest(op=op, dtype=dtype, attributes=attributes))
    assert chosen.provider == provider


def calls():
    """(operator, keyword) of every call in the source, and its positional arguments."""
    return [
        (node.func.attr, len(node.args), [k.arg for k in node.keywords])
        for node in ast.walk(ast.parse(inspect.getsource(ops)))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.ops.npu.")
    ]


def test_every_operator_is_called_somewhere_above():
    assert {name for name, _, _ in calls()} == set(BODIES)
    texts = json.dumps(SCHEMAS)
    assert all(f"npu::{name}(" in texts for name in BODIES)


@pytest.mark.parametrize(("name", "positional", "keywords"), calls(), ids=lambda x: str(x)[:40])
def test_keywords_and_places_are_those_of_the_schema(name, positional, keywords):
    arguments = torch._C.parse_schema(SCHEMAS[name]).arguments
    assert set(keywords) <= {argument.name for argument in arguments}
    assert positional <= sum(not argument.kwarg_only for argument in arguments)
    assert positional >= sum(
        not argument.has_default_value() for argument in arguments if not argument.kwarg_only
    )


KEYWORDS = [
    ("npu_fused_infer_attention_score", keyword, packed)
    for keyword in ("actual_seq_lengths_kv", "num_key_value_heads", "input_layout", "scale")
] + [("npu_fused_infer_attention_score_v2", "learnable_sink", lambda: packed(sinks=randn(4)))]


@pytest.mark.parametrize(("name", "keyword", "make"), KEYWORDS)
@pytest.mark.parametrize("change", ["misspelt", "retyped"])
def test_a_misspelt_or_retyped_argument_fails(name, keyword, make, change):
    """That is, a schema in which the argument has another name or type refuses our call."""
    text = SCHEMAS[name]
    place = text.index(f" {keyword}=")
    kind = text[:place].rpartition(", ")[2]
    if change == "misspelt":
        other = text.replace(f" {keyword}=", f" {keyword}x=")
    else:
        begin = place - len(kind)
        end = text.find(",", place) if text.find(",", place) > 0 else text.find(")", place)
        other = text[:begin] + f"Device? {keyword}=None" + text[end:]
    library = define(changes={name: other})
    library.impl(name, lambda *args, **kwargs: (args[0], args[0]), "CPU")
    try:
        with pytest.raises((RuntimeError, TypeError)):
            make()
    finally:
        library._destroy()
