# SPDX-License-Identifier: Apache-2.0
"""Sampling: greedy, plain and filtered rows, ties, and logits that are not finite.

Rows are made so that sums in any order choose the same token: some tokens in a hundred are
heavy, and all others together weigh less than rounding does.
"""

from __future__ import annotations

__all__ = ["CASES"]

from functools import partial
from typing import TYPE_CHECKING

import torch

from bedplate.reference import sampling as reference
from bedplate.reference.sampling import SamplingTables
from bedplate_triton.cases import Case, Inputs
from bedplate_triton.sampling import sample_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from bedplate_triton.features import Features

Row = tuple[float, int, float, float]
"""Temperature, top-k, top-p, min-p of a row."""

GREEDY: Row = (0.0, 0, 1.0, 0.0)
PLAIN: Row = (0.8, 0, 1.0, 0.0)
TOP_K: Row = (1.0, 6, 1.0, 0.0)
TOP_P: Row = (0.7, 0, 0.9, 0.0)
MIN_P: Row = (1.3, 0, 1.0, 0.1)
USUAL: Row = (0.6, 20, 0.95, 0.0)

_HEAVY = 40
"""Tokens that can be sampled, at most."""


def _make(
    device: torch.device,
    seed: int,
    *,
    vocabulary: int,
    settings: Sequence[Row],
    dtype: torch.dtype,
    special: str = "",
    padding: int = 0,
    light: float = -40.0,
) -> Inputs:
    """Rows of the given settings, then rows of padding; request rows in another order."""
    generator = torch.Generator().manual_seed(seed)
    size = len(settings)
    logits = torch.randn((size + padding, vocabulary), generator=generator) + light
    heavy = torch.stack(
        [torch.randperm(vocabulary, generator=generator)[:_HEAVY] for _ in range(len(logits))]
    )
    logits.scatter_(1, heavy, 4 * torch.rand(heavy.shape, generator=generator) + 6)
    if special == "nan":
        logits[::2, vocabulary // 2] = float("nan")
    if special == "minus infinity":
        logits[logits < 0] = float("-inf")
    if special == "ties":  # of all heavy tokens: which of them stay is decided by place
        logits[logits > 0] = 7.0
    if special == "zeros":  # the negative zero is no less than the other
        logits = torch.where(logits > 0, 0.0, logits)
        logits.scatter_(1, heavy[:, ::2], -0.0)
    if special == "infinity":
        logits[:, vocabulary // 3] = float("inf")
    owners = 1 + torch.randperm(size, generator=generator)
    tables = torch.zeros((size + 1, 4), dtype=torch.float64)
    tables[owners] = torch.tensor(settings, dtype=torch.float64)
    tables[0] = torch.tensor(GREEDY, dtype=torch.float64)
    seeds = torch.randint(-(2**62), 2**62, (size + 1,), generator=generator) * 2
    lengths = torch.randint(1, 40000, (size + padding,), generator=generator)
    return {
        "logits": logits.to(dtype).to(device),
        "rows": torch.cat((owners, owners.new_zeros(padding))).int().to(device),
        "seq_lens": lengths.int().to(device),
        "tables": SamplingTables(
            temperature=tables[:, 0].float().to(device),
            top_k=tables[:, 1].int().to(device),
            top_p=tables[:, 2].float().to(device),
            min_p=tables[:, 3].float().to(device),
            seed=seeds.to(device),
        ),
        "last_tokens": torch.full((size + 1,), -9).to(device),
    }


def _run(inputs: Inputs, features: Features) -> tuple[Tensor, ...]:
    tokens = sample_tokens(**inputs, features=features)
    # Rows of padding share the first place, and any of them may have it.
    return tokens, inputs["last_tokens"][1:]


def _reference(inputs: Inputs) -> tuple[Tensor, ...]:
    tokens = reference.sample_tokens(**inputs)
    return tokens, inputs["last_tokens"][1:]


def _small(
    name: str,
    vocabulary: int,
    settings: Sequence[Row],
    dtype: torch.dtype = torch.bfloat16,
    *,
    special: str = "",
    padding: int = 0,
) -> Case:
    make = partial(
        _make, vocabulary=vocabulary, settings=settings, dtype=dtype, special=special,
        padding=padding,
    )  # fmt: skip
    return Case(
        op="sampling", name=name, make=make, run=_run, reference=_reference, tolerance=0.0
    )


def _large(
    rows: int, settings: Row, target: float, vocabulary: int = 151936, name: str = "greedy"
) -> Case:
    make = partial(
        _make, vocabulary=vocabulary, settings=[settings] * rows, dtype=torch.bfloat16,
        light=-22.0,
    )  # fmt: skip
    return Case(
        op="sampling",
        name=f"{rows} rows of {vocabulary}, {name}",
        make=make,
        run=_run,
        reference=_reference,
        tolerance=0.0,
        small=False,
        nbytes=rows * vocabulary * 2,
        target=target,
    )


CASES = (
    _small("greedy", 1000, [GREEDY] * 3),
    _small("greedy, one row in float32", 3000, [GREEDY], torch.float32),
    _small("greedy and padding", 1030, [GREEDY] * 2, padding=3),
    _small("greedy, ties", 2100, [GREEDY] * 3, special="ties"),
    _small("greedy, both zeros", 300, [GREEDY] * 2, special="zeros"),
    _small("greedy, not a number", 2050, [GREEDY] * 3, special="nan"),
    _small("plain", 2500, [PLAIN] * 3),
    _small("plain in float32", 700, [PLAIN] * 2, torch.float32),
    _small("plain, minus infinity", 2100, [PLAIN, PLAIN], special="minus infinity"),
    _small("greedy, plain, filtered", 1500, [GREEDY, PLAIN, USUAL]),
    _small("top-k", 900, [TOP_K], torch.float16),
    _small("top-k, ties", 1500, [TOP_K], special="ties"),
    _small("top-p", 100, [TOP_P]),
    _small("top-p, ties", 2100, [TOP_P], special="ties"),
    _small("top-k and top-p, both zeros", 300, [USUAL], special="zeros"),
    _small("min-p", 1200, [MIN_P]),
    _small("filters in float32", 1100, [USUAL], torch.float32),
    _small("filters, minus infinity", 1100, [USUAL], special="minus infinity"),
    _small("random, not a number", 1100, [PLAIN, GREEDY, TOP_P], special="nan"),
    _small("infinity", 1100, [PLAIN, GREEDY, TOP_P], special="infinity"),
    _large(1, GREEDY, 0.02),
    _large(64, GREEDY, 0.45),
    _large(256, GREEDY, 0.7),
    _large(64, GREEDY, 0.45, vocabulary=128256),
    _large(1, USUAL, 0.0, name="top-k and top-p"),
    _large(64, PLAIN, 0.0, name="plain"),
    _large(64, TOP_P, 0.0, name="top-p"),
)
