# SPDX-License-Identifier: Apache-2.0
"""Steps of a recorded decode pass: what changes between two of them, at many sizes."""

from __future__ import annotations

__all__ = ["CASES"]

from functools import partial
from typing import TYPE_CHECKING

import torch

from bedplate.reference import decode_step as reference
from bedplate.reference.decode_step import DecodeRows
from bedplate_triton.cases import Case, Inputs
from bedplate_triton.decode_step import advance_decode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from bedplate_triton.features import Features

_CONTEXT = 96
_PAGE = 16
_FILL_LEN = 1


def _make(
    device: torch.device,
    seed: int,
    *,
    size: int,
    real: int,
    changed: Sequence[int] = (),
    index: torch.dtype = torch.int32,
    hold: bool = False,
    context: int = _CONTEXT,
) -> Inputs:
    """Rows of earlier steps, and ``changed`` places that get a new owner, length and slot.

    Places from n on hold what an earlier, fuller step left there.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator).to(dtype)

    # Every place and every change has a request row of its own.
    owners = (1 + torch.randperm(2 * size, generator=generator)).int()
    changes = torch.full((4 + 4 * size,), -7, dtype=torch.int32)
    changes[:3] = torch.tensor([real, len(changed), int(hold)])
    records = changes[4 : 4 + 4 * len(changed)].view(-1, 4)
    records[:, 0] = torch.tensor(changed, dtype=torch.int32)
    records[:, 1] = owners[size : size + len(changed)]
    records[:, 2] = draw(1, context, len(changed))
    records[:, 3] = draw(1, 900, len(changed)) * _PAGE
    tensors = {
        "changes": changes,
        "input_ids": draw(0, 1000, size, torch.int64),
        "positions": draw(0, context, size, torch.int64),
        "req_pool_indices": owners[:size].clone(),
        "seq_lens": draw(1, context - 1, size),
        "out_cache_loc": draw(1, 9000, size, index),
        "req_to_token": draw(1, 9000, (2 * size + 1) * context).view(-1, context),
        "last_tokens": draw(0, 150000, 2 * size + 1, torch.int64),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _arguments(inputs: Inputs) -> tuple[Tensor, DecodeRows, Tensor, Tensor, int]:
    names = ("input_ids", "positions", "req_pool_indices", "seq_lens", "out_cache_loc")
    rows = DecodeRows(**{name: inputs[name] for name in names})
    return (
        inputs["changes"], rows, inputs["req_to_token"], inputs["last_tokens"], _FILL_LEN,
    )  # fmt: skip


def _written(inputs: Inputs) -> tuple[Tensor, ...]:
    columns = _arguments(inputs)[1]
    # What padding leaves in the first row of the table is nobody's.
    return (
        columns.input_ids, columns.positions, columns.req_pool_indices, columns.seq_lens,
        columns.out_cache_loc, inputs["req_to_token"][1:],
    )  # fmt: skip


def _run(inputs: Inputs, features: Features) -> tuple[Tensor, ...]:
    advance_decode(*_arguments(inputs), features=features)
    return _written(inputs)


def _reference(inputs: Inputs) -> tuple[Tensor, ...]:
    reference.advance_decode(*_arguments(inputs))
    return _written(inputs)


def _nbytes(size: int) -> int:
    """Owner, length and slot read and written, token, position, its source, the table."""
    return size * (2 * 3 * 4 + 3 * 8 + 4)


def _case(
    name: str,
    size: int,
    real: int,
    changed: Sequence[int] = (),
    index: torch.dtype = torch.int32,
    *,
    hold: bool = False,
    small: bool = True,
) -> Case:
    context = _CONTEXT if small else 4096
    return Case(
        op="decode_step",
        name=name,
        make=partial(
            _make, size=size, real=real, changed=changed, index=index, hold=hold,
            context=context,
        ),
        run=_run,
        reference=_reference,
        tolerance=0.0,
        small=small,
        nbytes=0 if small else _nbytes(size),
    )  # fmt: skip


CASES = (
    _case("one row, nothing changed", 1, 1),
    _case("nothing changed", 7, 7),
    _case("nothing changed, wide slots", 7, 7, index=torch.int64),
    _case("no real row", 5, 0),
    _case("held", 6, 5, [2], hold=True),
    _case("padding", 33, 20),
    _case("one page ends", 8, 6, [3]),
    _case("all changed", 24, 24, range(24)),
    _case("all changed out of order, wide slots", 9, 9, range(8, -1, -1), torch.int64),
    _case("fewer rows, the hole filled", 8, 5, [1]),
    _case("more rows", 8, 8, [6, 7]),
    _case("1 row", 1, 1, small=False),
    _case("64 rows", 64, 64, small=False),
    _case("64 rows, wide slots", 64, 64, [9, 11], torch.int64, small=False),
    _case("256 rows, 16 changed", 256, 250, range(0, 240, 15), small=False),
    _case("1024 rows, all changed", 1024, 1024, range(1024), small=False),
)
