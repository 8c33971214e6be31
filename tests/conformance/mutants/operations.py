# SPDX-License-Identifier: Apache-2.0
"""Mistakes of operations: numbers, layout, honesty."""

from __future__ import annotations

from dataclasses import replace

import torch
from tests.conformance.mutants.base import mutant
from torch.nn import functional

from bedplate.contract import Support
from bedplate.reference import ops, rope, sampling
from bedplate.reference.decode_step import advance_decode


def truncated(x):
    """bfloat16 with its bits cut off instead of rounded."""
    return (x.float().view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


def norm_truncated(x, weight, eps, order):
    exact = ops.rms_norm(x.float(), None if weight is None else weight.float(), eps, order)
    return truncated(exact) if x.dtype is torch.bfloat16 else exact.to(x.dtype)


def norm_weight_first(x, weight, eps, order):
    order = "weight_fp32" if order == "weight_after_cast" else order
    return ops.rms_norm(x, weight, eps, order)


def norm_in_place(x, weight, eps, order):
    return x.copy_(ops.rms_norm(x, weight, eps, order))


def norm_gives_its_input(x, weight, eps, order):
    out = ops.rms_norm(x, weight, eps, order)
    return torch.as_strided(x, x.shape, x.stride()).copy_(out)


def norm_writes_beside(x, weight, eps, order):
    out = ops.rms_norm(x, weight, eps, order)
    if x.ndim == 2 and x.stride(0) > x.shape[1]:
        torch.as_strided(x, (1,), (1,), x.storage_offset() + x.shape[1]).zero_()
    return out


def norm_assumes_contiguous(x, weight, eps, order):
    packed = torch.as_strided(x, x.shape, torch.empty(x.shape).stride())
    return ops.rms_norm(packed, weight, eps, order)


def norm_fails_on_nothing(x, weight, eps, order):
    assert x.numel()
    return ops.rms_norm(x, weight, eps, order)


class Noisy:
    """Another last bit at every call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, weight, eps, order):
        self.calls += 1
        out = ops.rms_norm(x, weight, eps, order)
        return out * (1 + 2**-23) if self.calls % 2 and x.dtype is torch.float32 else out


def norm_by_batch(x, weight, eps, order):
    out = ops.rms_norm(x, weight, eps, order)
    return out * (1 + 2**-23) if x.shape[0] % 2 and x.dtype is torch.float32 else out


def one_wrong_element(x, weight, eps, order):
    out = ops.rms_norm(x, weight, eps, order)
    if out.numel() > 1000:
        out.view(-1)[-1] *= 1.001
    return out


def linear_without_bias(x, weight, bias=None, finish=True):
    return functional.linear(x, weight)


def linear_in_half(x, weight, bias=None, finish=True):
    if x.dtype is not torch.float32:
        return functional.linear(x, weight, bias)
    product = functional.linear(x.bfloat16(), weight.bfloat16()).float()
    return product if bias is None else product + bias


def linear_drops_last_rows(x, weight, bias=None, finish=True):
    out = functional.linear(x, weight, bias)
    out[out.shape[0] // 16 * 16 or len(out) :] = 0
    return out


def gate_swapped(x, act):
    first, second = x.chunk(2, -1)
    return ops.act_and_mul(torch.cat((second, first), -1), act)


def gate_exact_gelu(x, act):
    return ops.act_and_mul(x, "gelu" if act == "gelu_tanh" else act)


def gate_rounds_once(x, act):
    return ops.act_and_mul(x.float(), act).to(x.dtype)


def sum_not_rounded(x, residual, weight, bias, eps, order):
    out, total = ops.add_norm(x, residual, weight, bias, eps, order)
    if residual is None or isinstance(x, ops.PartialProduct):
        return out, total
    wide = residual.float() + x.float()
    if order == "layer_norm":
        return functional.layer_norm(
            wide.to(x.dtype), wide.shape[-1:], weight, bias, eps
        ), total
    return ops.rms_norm(wide, weight, eps, order).to(x.dtype), total


def residual_forgotten(x, residual, weight, bias, eps, order):
    out, _ = ops.add_norm(x, residual, weight, bias, eps, order)
    return out, x.whole() if isinstance(x, ops.PartialProduct) else x


def heads(change):
    """The operation on heads with changed arguments."""

    def call(q, k, v, positions, rope_, norm, keys=None, values=None, slots=None):
        given = {
            "q": q,
            "k": k,
            "v": v,
            "positions": positions,
            "rope": rope_,
            "norm": norm,
            "keys": keys,
            "values": values,
            "slots": slots,
        }
        rope.qk_norm_rope_write(**(given | change(given)))

    def named(q, k, v, positions, rope, norm, keys=None, values=None, slots=None):
        call(q, k, v, positions, rope, norm, keys, values, slots)

    return named


def without_values(given):
    return {"values": None if given["values"] is None else torch.empty_like(given["values"])}


def rotated_as_halves(given):
    table = given["rope"]
    return {"rope": table and replace(table, style="half")}


def beside_the_slot(given):
    return {"slots": None if given["slots"] is None else given["slots"] % 62 + 2}


def sample(change):
    def call(logits, rows, seq_lens, tables, last_tokens):
        given = {
            "logits": logits,
            "rows": rows,
            "seq_lens": seq_lens,
            "tables": tables,
            "last_tokens": last_tokens,
        }
        return sampling.sample_tokens(**(given | change(given)))

    return call


def forgets_last_tokens(logits, rows, seq_lens, tables, last_tokens):
    return sampling.sample_tokens(logits, rows, seq_lens, tables, last_tokens.clone())


def one_seed(given):
    tables = given["tables"]
    return {"tables": replace(tables, seed=torch.zeros_like(tables.seed))}


def top_p_off(given):
    tables = given["tables"]
    return {"tables": replace(tables, top_p=torch.ones_like(tables.top_p))}


def top_k_one_less(given):
    tables = given["tables"]
    return {
        "tables": replace(
            tables, top_k=torch.where(tables.top_k > 1, tables.top_k - 1, tables.top_k)
        )
    }


def last_of_equals(logits, rows, seq_lens, tables, last_tokens):
    tokens = sampling.sample_tokens(logits, rows, seq_lens, tables, last_tokens)
    flipped = logits.shape[-1] - 1 - sampling.sample_greedy(logits.flip(-1))
    greedy = (tables.temperature[rows.long()] == 0) & (tokens >= 0)
    tokens = torch.where(greedy, flipped, tokens)
    last_tokens[rows.long()] = tokens.clamp(min=0)
    return tokens


def step_ignores_hold(changes, rows, req_to_token, last_tokens, fill_len):
    changes = changes.clone()
    changes[2] = 0
    advance_decode(changes, rows, req_to_token, last_tokens, fill_len)


def step_leaves_padding(changes, rows, req_to_token, last_tokens, fill_len):
    old = rows.out_cache_loc.clone()
    advance_decode(changes, rows, req_to_token, last_tokens, fill_len)
    if not bool(changes[2]):
        real = torch.arange(len(old)) < changes[0]
        rows.out_cache_loc.copy_(torch.where(real, rows.out_cache_loc, old))


def step_keeps_position(changes, rows, req_to_token, last_tokens, fill_len):
    advance_decode(changes, rows, req_to_token, last_tokens, fill_len)
    rows.positions.sub_(1).clamp_(min=0)


def _nudged(x):
    return torch.nextafter(x, x * 2) if x.dtype is torch.float32 else x


def says(answer):
    return lambda _request: answer


def raises(_request):
    raise TypeError("no attributes")


NORM = ops.rms_norm

MUTANTS = {
    "one_ulp": mutant(
        2,
        "every float32 norm is larger by one unit in the last place",
        ops={"rms_norm": lambda x, weight, eps, order: _nudged(NORM(x, weight, eps, order))},
    ),
    "norm_without_eps": mutant(
        2,
        "a norm that adds nothing to the mean square",
        ops={"rms_norm": lambda x, weight, eps, order: NORM(x, weight, 0.0, order)},
    ),
    "bf16_truncation": mutant(
        2, "bfloat16 is cut off, not rounded", ops={"rms_norm": norm_truncated}
    ),
    "norm_weight_first": mutant(
        2,
        "the weight before the cast to the input's dtype",
        ops={"rms_norm": norm_weight_first},
    ),
    "norm_in_place": mutant(
        2, "a norm that changes its input", ops={"rms_norm": norm_in_place}
    ),
    "norm_gives_its_input": mutant(
        2, "a result in an argument's memory", ops={"rms_norm": norm_gives_its_input}
    ),
    "norm_writes_beside": mutant(
        2, "a write one element behind a row", ops={"rms_norm": norm_writes_beside}
    ),
    "norm_assumes_contiguous": mutant(
        2, "strides of rows are ignored", ops={"rms_norm": norm_assumes_contiguous}
    ),
    "norm_fails_on_nothing": mutant(
        2, "no rows are an error", ops={"rms_norm": norm_fails_on_nothing}
    ),
    "norm_is_noisy": mutant(
        2, "promises equal bits, and a second run has others", ops={"rms_norm": Noisy()}
    ),
    "norm_by_batch": mutant(
        2,
        "promises batch_invariant, and bits depend on the number of rows",
        ops={"rms_norm": {"call": norm_by_batch, "determinism": "batch_invariant"}},
    ),
    "one_wrong_element": mutant(
        2,
        "the last element of a large tensor is off by 0.1 %",
        ops={"rms_norm": one_wrong_element},
    ),
    "linear_without_bias": mutant(
        2, "a product without its bias", ops={"linear": linear_without_bias}
    ),
    "linear_in_half": mutant(
        2, "float32 products are taken in bfloat16", ops={"linear": linear_in_half}
    ),
    "linear_drops_last_rows": mutant(
        2, "rows behind the last full block are zero", ops={"linear": linear_drops_last_rows}
    ),
    "gate_swapped": mutant(2, "the other half is activated", ops={"act_and_mul": gate_swapped}),
    "gate_exact_gelu": mutant(
        2, "gelu where its approximation is asked for", ops={"act_and_mul": gate_exact_gelu}
    ),
    "gate_rounds_once": mutant(
        2,
        "the activation is not rounded before the product",
        ops={"act_and_mul": gate_rounds_once},
    ),
    "sum_not_rounded": mutant(
        2, "the norm of a sum that was not rounded", ops={"add_norm": sum_not_rounded}
    ),
    "residual_forgotten": mutant(
        2, "the sum that is given back lacks the residual", ops={"add_norm": residual_forgotten}
    ),
    "rope_off_by_one": mutant(
        2,
        "heads turn by the position before",
        ops={
            "qk_norm_rope_write": heads(
                lambda g: {"positions": (g["positions"] - 1).clamp(min=0)}
            )
        },
    ),
    "rope_pairs_as_halves": mutant(
        2, "pairs turn as halves", ops={"qk_norm_rope_write": heads(rotated_as_halves)}
    ),
    "rope_always_stepwise": mutant(
        2,
        "every product rounds, also where the sum alone should",
        ops={
            "qk_norm_rope_write": heads(
                lambda g: {"rope": g["rope"] and replace(g["rope"], stepwise=True)}
            )
        },
    ),
    "values_not_written": mutant(
        2,
        "keys reach the cache, values do not",
        ops={"qk_norm_rope_write": heads(without_values)},
    ),
    "written_beside_the_slot": mutant(
        2,
        "keys and values reach the wrong slots",
        ops={"qk_norm_rope_write": heads(beside_the_slot)},
    ),
    "wrong_sampling_seed": mutant(
        2, "every request samples with the same seed", ops={"sample_tokens": sample(one_seed)}
    ),
    "sampling_position_off_by_one": mutant(
        2,
        "the random number of the position before",
        ops={"sample_tokens": sample(lambda g: {"seq_lens": g["seq_lens"] - 1})},
    ),
    "top_p_off": mutant(2, "top-p is ignored", ops={"sample_tokens": sample(top_p_off)}),
    "top_k_one_less": mutant(
        2, "top-k keeps one token less", ops={"sample_tokens": sample(top_k_one_less)}
    ),
    "last_of_equals": mutant(
        2, "greedy takes the last of equal tokens", ops={"sample_tokens": last_of_equals}
    ),
    "last_tokens_forgotten": mutant(
        2,
        "the next step does not find the sampled token",
        ops={"sample_tokens": forgets_last_tokens},
    ),
    "step_ignores_hold": mutant(
        2, "rows move on although they are held", ops={"advance_decode": step_ignores_hold}
    ),
    "step_leaves_padding": mutant(
        2,
        "rows of padding keep the slots of earlier requests",
        ops={"advance_decode": step_leaves_padding},
    ),
    "step_keeps_position": mutant(
        2, "positions lag behind by one", ops={"advance_decode": step_keeps_position}
    ),
    "lying_supports": mutant(
        2,
        "claims a rounding order that it does not have",
        ops={"rms_norm": lambda x, weight, eps, order: NORM(x, weight, eps, "weight_fp32")},
    ),
    "supports_raises": mutant(
        2, "supports() raises", ops={"rms_norm": {"call": NORM, "supports": raises}}
    ),
    "refuses_without_reason": mutant(
        2,
        "supports() says no and not why",
        ops={"rms_norm": {"call": NORM, "supports": says(Support(False))}},
    ),
    "supports_gives_a_bool": mutant(
        2, "supports() gives a bool", ops={"rms_norm": {"call": NORM, "supports": says(True)}}
    ),
}
