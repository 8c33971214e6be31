# SPDX-License-Identifier: Apache-2.0
"""Cases of every named operation: what is asked, with which arguments, and how close.

Arguments are drawn on the host from a seed and placed on the device by whoever runs the case.
What a case must give is the operation's meaning, ``bedplate.reference.ops``, on the host.

Shapes: T tokens, E features in, N features out, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

__all__ = ["CASES", "DTYPES", "Draw", "OpCase", "cases_of"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from bedplate.reference.decode_step import CHANGE_WIDTH, HEADER_WIDTH, DecodeRows
from bedplate.reference.ops import (
    ACTIVATIONS,
    NORM_ORDERS,
    OPERATIONS,
    RMS_NORM_ORDERS,
    PartialProduct,
)
from bedplate.reference.rope import HeadNorm, RopeTable
from bedplate.reference.sampling import SamplingTables

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

Arguments = dict[str, Any]
Make = Callable[["Draw", torch.dtype], Arguments]

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the dtypes that every operation is asked in."""

_SUMS = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}
"""Relative error of rows that were summed in another order."""
_ULPS = 4.0
"""Units in the last place of a row's largest number that one element may be off."""


class Draw:
    """Random host tensors of one case.

    Args:
        seed: The same numbers for the same seed.
        page_size: Tokens a page; caches are whole pages, as pools are.
    """

    def __init__(self, seed: int, page_size: int = 1) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._page_size = page_size

    def whole_pages(self, slots: int) -> int:
        """The least number of slots that are whole pages, page 0 and another at least."""
        size = self._page_size
        return -(-max(slots, 2 * size) // size) * size

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Normal numbers."""
        return (scale * torch.randn(shape, generator=self._generator)).to(dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 numbers from ``low`` to ``high − 1``."""
        return torch.randint(low, high, shape, generator=self._generator)

    def order(self, size: int) -> Tensor:
        """A permutation, int64."""
        return torch.randperm(size, generator=self._generator)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCase:
    """One use of one operation.

    Attributes:
        op: Name of the operation.
        name: What is special about it; without slashes and blanks.
        dtype: Name of the dtype of activations.
        make: Draws arguments on the host.
        attributes: Static properties, as the core asks for them.
        writes: Arguments that the operation changes in place.
        padded: Arguments whose first row is padding's: whatever is there is nobody's.
        spaced: Arguments whose rows may lie apart, and do.
        shifted: Whether tensors begin off their alignment.
        fresh: Whether results must not share memory with arguments.
        rows: Argument → rows of the batch, where the rows are independent of each other.
        tolerance: Largest relative error; 0 means equal bits.
        differing: Largest share of elements whose bits may differ, in types of 16 bits: sums in
            another order flip few roundings, another order of rounding flips many.
        wide: Whether the meaning is taken in float64 and rounded once at the end.
        empty: Whether there are no rows; such a case shows no surplus.
        nbytes: Bytes that must move at least; cases with it are timed.
    """

    op: str
    name: str
    dtype: str
    make: Make
    attributes: Mapping[str, Any] = field(default_factory=dict)
    writes: tuple[str, ...] = ()
    padded: tuple[str, ...] = ()
    spaced: tuple[str, ...] = ()
    shifted: bool = False
    fresh: bool = False
    rows: tuple[str, ...] = ()
    tolerance: float
    differing: float = 1.0
    wide: bool = False
    empty: bool = False
    nbytes: int = 0

    @property
    def label(self) -> str:
        """Name that is unique for the operation."""
        return f"{self.name}.{self.dtype}"

    @property
    def ulps(self) -> float:
        """Largest error of one element, in units in the last place of its row."""
        return 0.0 if self.tolerance == 0 else _ULPS * (16 if self.dtype == "float32" else 1)

    def arguments(self, page_size: int, seed: int = 0) -> Arguments:
        """Drawn anew, with caches of whole pages; the same for the same seed."""
        return self.make(Draw(seed, page_size), getattr(torch, self.dtype))

    def written(self, arguments: Arguments) -> list[Any]:
        """What the operation left in the arguments that it changes."""
        given = [(name, arguments.get(name)) for name in self.writes]
        return [
            value[1:] if name in self.padded else value
            for name, value in given
            if value is not None
        ]

    @property
    def meaning(self) -> Callable[..., Any]:
        """The plain-torch function; changes what it writes in its arguments."""
        return OPERATIONS[self.op]


def cases_of(op: str) -> tuple[OpCase, ...]:
    """The cases of one operation."""
    return tuple(case for case in CASES if case.op == op)


_FEW = 0.1
"""Share of elements that may round otherwise where the order of rounding is the meaning."""

_SHAPES = {
    "one": (1, 64),
    "odd": (7, 37),
    "none": (0, 64),
    "ranks": (2, 3, 48),
    "many": (33, 96),
    "tiny": (6, 64),
}
"""Name → shape of activations: one row, odd sizes, no rows, more dimensions, several blocks;
``tiny`` numbers, of which the square is about as large as what a norm adds to it."""


def _norm(
    draw: Draw, dtype: torch.dtype, *, shape: tuple[int, ...], order: str, scale: float = 2.0
) -> Arguments:
    size = shape[-1]
    weight = None if order == "no_weight" else 1 + draw.normal(size, dtype=dtype, scale=0.3)
    x = scale / 4 + draw.normal(*shape, dtype=dtype, scale=scale)
    return {"x": x, "weight": weight, "eps": 1e-6, "order": order}


def _add_norm(
    draw: Draw, dtype: torch.dtype, *, shape: tuple[int, ...], order: str, residual: bool,
    parts: int = 0,
) -> Arguments:  # fmt: skip
    arguments = _norm(draw, dtype, shape=shape, order=order)
    if parts:
        pieces = draw.normal(parts, *shape, dtype=torch.float32)
        bias = draw.normal(shape[-1], dtype=dtype)
        arguments["x"] = PartialProduct(parts=pieces, bias=bias, dtype=dtype)
    other = draw.normal(*shape, dtype=dtype) if residual else None
    shift = draw.normal(shape[-1], dtype=dtype) if order == "layer_norm" else None
    return arguments | {"residual": other, "bias": shift}


def _scale(name: str) -> float:
    return 1e-3 if name == "tiny" else 2.0


def _norms() -> Iterator[OpCase]:
    for dtype, order in product(DTYPES, RMS_NORM_ORDERS):
        for name, shape in _SHAPES.items():
            if name != "odd" and order not in ("weight_after_cast", "one_plus_weight_fp32"):
                continue
            yield OpCase(
                op="rms_norm", name=f"{order}.{name}", dtype=dtype, tolerance=_SUMS[dtype],
                make=partial(_norm, shape=shape, order=order, scale=_scale(name)), fresh=True,
                rows=("x",), differing=_FEW,
                attributes={"order": order, "size": shape[-1], "eps": 1e-6},
                spaced=("x",) if name in ("odd", "ranks") else (), shifted=name == "many",
                empty=name == "none",
                nbytes=4 * shape[0] * shape[-1] if name == "many" else 0,
            )  # fmt: skip
    sums: dict[str, dict[str, Any]] = {
        "sum": {"shape": (7, 37), "residual": True},
        "alone": {"shape": (3, 64), "residual": False},
        "parts": {"shape": (5, 48), "residual": True, "parts": 3},
        "none": {"shape": (0, 64), "residual": True},
    }
    for dtype, order in product(DTYPES, NORM_ORDERS):
        for name, facts in sums.items():
            if name in ("parts", "none") and order != "weight_after_cast":
                continue
            yield OpCase(
                op="add_norm", name=f"{order}.{name}", dtype=dtype, tolerance=_SUMS[dtype],
                make=partial(_add_norm, order=order, **facts),
                attributes={"order": order, "size": facts["shape"][-1]}, differing=_FEW,
                empty=name == "none",
                rows=() if name in ("parts", "none") else ("x", "residual"),
            )  # fmt: skip


def _linear(
    draw: Draw, dtype: torch.dtype, *, rows: int, size: tuple[int, int], bias: bool,
    finish: bool = True,
) -> Arguments:  # fmt: skip
    wide, out = size
    return {
        "x": draw.normal(rows, wide, dtype=dtype),
        "weight": draw.normal(out, wide, dtype=dtype, scale=wide**-0.5),
        "bias": draw.normal(out, dtype=dtype) if bias else None,
        "finish": finish,
    }


def _linears() -> Iterator[OpCase]:
    shapes = {
        "one": (1, (64, 96), False),
        "few": (3, (80, 48), True),
        "odd": (17, (37, 53), True),
        "none": (0, (64, 32), False),
        "many": (70, (128, 160), False),
    }
    for dtype, (name, (rows, size, bias)) in product(DTYPES, shapes.items()):
        for finish in (True, False):
            if finish or name in ("one", "few"):
                yield OpCase(
                    op="linear", name=name if finish else f"{name}.in_parts", dtype=dtype,
                    make=partial(_linear, rows=rows, size=size, bias=bias, finish=finish),
                    attributes={"in": size[0], "out": size[1]}, tolerance=_SUMS[dtype],
                    wide=True, rows=("x",), nbytes=2 * size[0] * size[1] * (name == "many"),
                    empty=name == "none",
                )  # fmt: skip


def _norm_linear(
    draw: Draw, dtype: torch.dtype, *, rows: int, size: tuple[int, int], order: str,
    act: str | None, residual: bool, parts: int = 0,
) -> Arguments:  # fmt: skip
    wide, out = size
    norm = _add_norm(
        draw, dtype, shape=(rows, wide), order=order, residual=residual, parts=parts
    )
    return {
        "x": norm["x"],
        "residual": norm["residual"],
        "norm_weight": norm["weight"],
        "norm_bias": norm["bias"],
        "eps": 1e-6,
        "order": order,
        "weight": draw.normal(out, wide, dtype=dtype, scale=wide**-0.5),
        "bias": draw.normal(out, dtype=dtype) if act is None else None,
        "act": act,
    }


def _norm_linears() -> Iterator[OpCase]:
    shapes: dict[str, dict[str, Any]] = {
        "one": {"rows": 1, "size": (64, 96), "act": None, "residual": True},
        "gated": {"rows": 5, "size": (48, 64), "act": "silu", "residual": True},
        "alone": {"rows": 9, "size": (37, 26), "act": "gelu_tanh", "residual": False},
        "parts": {"rows": 3, "size": (64, 32), "act": None, "residual": True, "parts": 2},
        "none": {"rows": 0, "size": (64, 32), "act": None, "residual": True},
    }
    orders = ("weight_after_cast", "one_plus_weight_fp32", "layer_norm")
    for dtype, order, (name, facts) in product(DTYPES, orders, shapes.items()):
        wide, out = facts["size"]
        if order != "weight_after_cast" and name not in ("one", "gated"):
            continue
        yield OpCase(
            op="norm_linear", name=f"{order}.{name}", dtype=dtype,
            make=partial(_norm_linear, order=order, **facts),
            attributes={"in": wide, "out": out, "order": order, "act": facts["act"]},
            tolerance=2 * _SUMS[dtype], empty=name == "none",
            rows=() if name in ("parts", "none") else ("x", "residual"),
        )  # fmt: skip


def _gate(draw: Draw, dtype: torch.dtype, *, shape: tuple[int, ...], act: str) -> Arguments:
    wide = (*shape[:-1], 2 * shape[-1])
    return {"x": draw.normal(*wide, dtype=dtype, scale=3.0), "act": act}


def _gates() -> Iterator[OpCase]:
    for dtype, act in product(DTYPES, ACTIVATIONS):
        for name, shape in _SHAPES.items():
            if name == "odd" or act == "silu":
                yield OpCase(
                    op="act_and_mul", name=f"{act}.{name}", dtype=dtype, fresh=True,
                    differing=_FEW,
                    make=partial(_gate, shape=shape, act=act), attributes={"act": act},
                    spaced=("x",) if name in ("odd", "ranks") else (), rows=("x",),
                    shifted=name == "many", tolerance=_SUMS[dtype], empty=name == "none",
                    nbytes=6 * shape[0] * shape[-1] if name == "many" else 0,
                )  # fmt: skip


_POSITIONS, _POOL = 40, 64


def _heads(
    draw: Draw, dtype: torch.dtype, *, tokens: int = 5, heads: tuple[int, int] = (4, 2),
    size: int = 16, value_size: int | None = None, rotated: int | None = None,
    style: str = "half", stepwise: bool = True, order: str = "", flat: bool = False,
    pool: str | None = "same", slots: torch.dtype = torch.int64, wide_angles: bool = False,
) -> Arguments:  # fmt: skip
    queries, keys = heads
    value_size = value_size or size
    rotated = size if rotated is None else rotated
    angles = torch.arange(_POSITIONS)[:, None] * 0.7 ** torch.arange(max(rotated // 2, 1))
    cos, sin = ((x if wide_angles else x.to(dtype)) for x in (angles.cos(), angles.sin()))
    rope = RopeTable(cos=cos, sin=sin, style=style, stepwise=stepwise)
    arguments: Arguments = {
        "q": draw.normal(tokens, queries, size, dtype=dtype),
        "k": draw.normal(tokens, keys, size, dtype=dtype),
        "v": draw.normal(tokens, keys, value_size, dtype=dtype),
        "positions": draw.integers(0, _POSITIONS, tokens),
        "rope": rope if rotated else None,
        "norm": None,
    }
    if order:
        weights = [
            None
            if order == "no_weight"
            else 1 + draw.normal(count * size if flat else size, dtype=dtype, scale=0.3)
            for count in heads
        ]
        arguments["norm"] = HeadNorm(
            q_weight=weights[0], k_weight=weights[1], eps=1e-6, order=order, flat=flat
        )
    if pool is not None:
        kind = dtype if pool == "same" else getattr(torch, pool)
        rows = draw.whole_pages(_POOL)
        arguments |= {
            "keys": torch.full((rows, keys, size), float("nan")).to(kind),
            "values": torch.full((rows, keys, value_size), float("nan")).to(kind),
            "slots": (1 + draw.order(rows - 1)[:tokens]).to(slots),
        }
    return arguments


def _head_cases() -> Iterator[OpCase]:
    kinds: dict[str, dict[str, Any]] = {
        "halves": {},
        "halves.rounded_once": {"stepwise": False, "slots": torch.int32},
        "halves.wide_angles": {"stepwise": False, "wide_angles": True},
        "pairs": {"style": "interleaved", "tokens": 1},
        "pairs.rounded_once": {"style": "interleaved", "stepwise": False, "pool": None},
        "some_columns": {"size": 40, "rotated": 12, "heads": (5, 1)},
        "other_values": {"size": 24, "value_size": 40},
        "no_rotation": {"rotated": 0},
        "no_tokens": {"tokens": 0},
        "many": {"tokens": 33, "heads": (8, 8), "size": 32},
        "other_pool": {"pool": "float16"},
        "normed": {"order": "weight_after_cast"},
        "normed.one_plus": {"order": "one_plus_weight_fp32"},
        "normed.pairs": {"order": "weight_fp32", "style": "interleaved", "pool": None},
        "normed.flat": {"order": "weight_after_cast", "flat": True, "heads": (5, 2)},
        "normed.no_weight": {"order": "no_weight", "rotated": 0},
    }
    for dtype, (name, facts) in product(DTYPES, kinds.items()):
        size, heads = facts.get("size", 16), facts.get("heads", (4, 2))
        yield OpCase(
            op="qk_norm_rope_write", name=name, dtype=dtype, make=partial(_heads, **facts),
            attributes={
                "head_dim": size, "value_dim": facts.get("value_size", size),
                "heads": heads[0], "rotated": facts.get("rotated", size),
                "norm": facts.get("order", ""), "flat": facts.get("flat", False),
            },
            writes=("q", "k", "keys", "values"), spaced=("q", "k", "v"), differing=_FEW,
            empty=name == "no_tokens",
            tolerance=_SUMS[dtype] if "order" in facts else _STEPS[dtype],
        )  # fmt: skip


_STEPS = {"float32": 5e-7, "bfloat16": 3e-3, "float16": 4e-4}
"""Relative error where products may be contracted with their sum, and nothing else differs."""

_GREEDY, _PLAIN = (0.0, 0, 1.0, 0.0), (0.8, 0, 1.0, 0.0)
_TOP_K, _TOP_P, _MIN_P = (1.0, 6, 1.0, 0.0), (0.7, 0, 0.9, 0.0), (1.3, 0, 1.0, 0.1)
_USUAL = (0.6, 20, 0.95, 0.0)
_HEAVY = 40


def _logits(
    draw: Draw, dtype: torch.dtype, *, vocabulary: int,
    settings: list[tuple[float, int, float, float]], special: str = "", padding: int = 0,
) -> Arguments:  # fmt: skip
    """Rows in which some tokens are heavy and all others weigh less than rounding does.

    So sums in any order choose the same token.
    """
    size = len(settings)
    logits = draw.normal(size + padding, vocabulary, dtype=torch.float32) - 40.0
    heavy = torch.stack([draw.order(vocabulary)[:_HEAVY] for _ in range(size + padding)])
    weights = 6 + 4 * draw.integers(0, 1000, *heavy.shape) / 1000
    logits.scatter_(1, heavy, weights)
    if special == "nan":
        logits[::2, vocabulary // 2] = float("nan")
    if special == "minus_infinity":
        logits[logits < 0] = float("-inf")
    if special == "ties":
        logits[logits > 0] = 7.0
    owners = 1 + draw.order(size)
    table = torch.zeros(size + 1, 4, dtype=torch.float64)
    table[owners] = torch.tensor(settings, dtype=torch.float64)
    table[0] = torch.tensor(_GREEDY, dtype=torch.float64)
    return {
        "logits": logits.to(dtype),
        "rows": torch.cat((owners, owners.new_zeros(padding))).int(),
        "seq_lens": draw.integers(1, 40000, size + padding).int(),
        "tables": SamplingTables(
            temperature=table[:, 0].float(),
            top_k=table[:, 1].int(),
            top_p=table[:, 2].float(),
            min_p=table[:, 3].float(),
            seed=2 * draw.integers(-(2**62), 2**62, size + 1),
        ),
        "last_tokens": torch.full((size + 1,), -9),
    }


def _sampling() -> Iterator[OpCase]:
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"settings": [_GREEDY] * 3},
        "greedy.ties": {"settings": [_GREEDY] * 3, "special": "ties"},
        "greedy.padding": {"settings": [_GREEDY] * 2, "padding": 3},
        "greedy.nan": {"settings": [_GREEDY] * 3, "special": "nan"},
        "plain": {"settings": [_PLAIN] * 4},
        "top_k": {"settings": [_TOP_K] * 4},
        "top_k.ties": {"settings": [_TOP_K] * 2, "special": "ties"},
        "top_p": {"settings": [_TOP_P] * 4},
        "min_p": {"settings": [_MIN_P] * 4},
        "mixed": {"settings": [_GREEDY, _PLAIN, _USUAL, _TOP_P, _MIN_P]},
        "filters.minus_infinity": {"settings": [_USUAL], "special": "minus_infinity"},
    }
    for dtype, (name, facts) in product(DTYPES, kinds.items()):
        yield OpCase(
            op="sample_tokens", name=name, dtype=dtype, tolerance=0.0,
            make=partial(_logits, vocabulary=700, **facts), writes=("last_tokens",),
            padded=("last_tokens",),
        )  # fmt: skip


def _step(
    draw: Draw, _dtype: torch.dtype, *, size: int, real: int, changed: tuple[int, ...] = (),
    hold: bool = False, slots: torch.dtype = torch.int32, context: int = 48,
) -> Arguments:  # fmt: skip
    owners = (1 + draw.order(2 * size)).int()
    changes = torch.full((HEADER_WIDTH + CHANGE_WIDTH * size,), -7, dtype=torch.int32)
    changes[:3] = torch.tensor([real, len(changed), int(hold)])
    entries = changes[HEADER_WIDTH : HEADER_WIDTH + CHANGE_WIDTH * len(changed)].view(
        -1, CHANGE_WIDTH
    )
    entries[:, 0] = torch.tensor(changed, dtype=torch.int32)
    entries[:, 1] = owners[size : size + len(changed)]
    entries[:, 2] = draw.integers(1, context, len(changed)).int()
    entries[:, 3] = draw.integers(1, 900, len(changed)).int()
    rows = DecodeRows(
        input_ids=draw.integers(0, 1000, size),
        positions=draw.integers(0, context, size),
        req_pool_indices=owners[:size].clone(),
        seq_lens=draw.integers(1, context - 1, size).int(),
        out_cache_loc=draw.integers(1, 9000, size).to(slots),
    )
    return {
        "changes": changes,
        "rows": rows,
        "req_to_token": draw.integers(1, 9000, 2 * size + 1, context).int(),
        "last_tokens": draw.integers(0, 150000, 2 * size + 1),
        "fill_len": 1,
    }


def _steps() -> Iterator[OpCase]:
    kinds: dict[str, dict[str, Any]] = {
        "one": {"size": 1, "real": 1},
        "full": {"size": 4, "real": 4},
        "padded": {"size": 8, "real": 5},
        "empty": {"size": 4, "real": 0},
        "changed": {"size": 8, "real": 7, "changed": (0, 6, 3)},
        "held": {"size": 4, "real": 3, "changed": (1,), "hold": True},
        "wide_slots": {"size": 4, "real": 3, "changed": (2,), "slots": torch.int64},
    }
    for name, facts in kinds.items():
        yield OpCase(
            op="advance_decode", name=name, dtype="int32", tolerance=0.0,
            make=partial(_step, **facts), writes=("rows", "req_to_token"),
            padded=("req_to_token",),
        )  # fmt: skip


CASES: tuple[OpCase, ...] = (
    *_norms(),
    *_linears(),
    *_norm_linears(),
    *_gates(),
    *_head_cases(),
    *_sampling(),
    *_steps(),
)
"""Every case of every operation."""
