# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803, RUF005 - constants are capitals; kernels cannot unpack into a tuple
"""Linear layers of few rows, with the norm before and the gated activation after them.

With few rows a linear layer is nothing but reading its weights, so everything here serves
that: loads of many tiles in flight, some before the kernel may read its input, and what
stands around the layer done by programs that wait for weights anyway.

``gemv`` takes up to ``MAX_GEMV_ROWS`` rows: a program sums some rows of the weights in float32
registers, without shared memory or matrix units; with ``fuse`` each program also adds and
norms its input, which is short and stays close, so the norm needs no launch.  ``skinny`` takes
up to ``MAX_SKINNY_ROWS``: a matrix product whose rows are padded.  More rows are torch's own.
Which form serves a shape, and its sizes, is measured: see ``configs``.

Weights, also those of the norm, are constants: where launches are chained they are read before
the kernels launched before have ended.

The order of a sum depends on the form and on its sizes, never on another row.

Shapes: M rows, E features in, N rows of weights; O features out, which is N, or N / 2 with an
activation.
"""

from __future__ import annotations

__all__ = ["MAX_GEMV_ROWS", "MAX_SKINNY_ROWS", "linear", "norm_linear"]

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from bedplate.errors import ContractError
from bedplate.reference.ops import ACTIVATIONS, NORM_ORDERS, PartialProduct
from bedplate_triton import configs
from bedplate_triton.gated import act_and_mul, activate
from bedplate_triton.norm import add_norm, weigh
from bedplate_triton.sizes import cdiv, power_of_two

if TYPE_CHECKING:
    from bedplate_triton.features import Features

MAX_GEMV_ROWS = 4
"""Largest M of the form ``gemv``."""
MAX_SKINNY_ROWS = 64
"""Largest M of the form ``skinny``."""

_HELD_BYTES = 256
"""Of its input a thread keeps at most so much in registers: a quarter of them."""
_ADD_COLUMNS = 256
"""Outputs a program of the kernel that adds the splits."""


class _Norm(NamedTuple):
    """What stands before a layer; see ``bedplate.reference.ops.add_norm``."""

    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    order: str


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    finish: bool = True,
    *,
    features: Features,
) -> Tensor | PartialProduct:
    """See ``bedplate.reference.ops.linear``; sums are float32 and round once, bias included.

    Args:
        x: ``[…, E]``, a float of at most 32 bits; rows may lie apart.
        weight: ``[N, E]`` in the dtype of ``x``; rows may lie apart.
        bias: ``[N]`` in the same dtype, or ``None``.
        finish: Whether the result must be whole.
        features: The device.

    Returns:
        ``[…, N]`` in the dtype of ``x``, new and contiguous.

    Raises:
        ContractError: The shapes do not fit each other, or features are not adjacent.
    """
    _check(x, weight, bias, None)
    if _is_many(x):
        return functional.linear(x, weight, bias)
    config = _choose(x, weight, features, norm=False, act=False)
    if not finish and config["form"] == "skinny" and x.numel():
        return _skinny_parts(x, weight, bias, None, config, features)
    return _project(x, weight, bias, None, config, features)


def norm_linear(
    x: Tensor | PartialProduct,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    order: str,
    weight: Tensor,
    bias: Tensor | None = None,
    act: str | None = None,
    *,
    features: Features,
) -> tuple[Tensor, Tensor]:
    """See ``bedplate.reference.ops.norm_linear``; rounds where that rounds.

    Args:
        x: ``[…, E]``, a float of at most 32 bits; rows may lie apart. Or a product in parts.
        residual: The same, or ``None`` where nothing is added.
        norm_weight: ``[E]``, or ``None`` for an order that takes none.
        norm_bias: ``[E]`` for ``layer_norm``, or ``None``.
        eps: Added to the mean square, or to the variance.
        order: One of ``NORM_ORDERS``.
        weight: ``[N, E]`` in the dtype of ``x``; with ``act`` the rows of the gate come first.
        bias: ``[N]`` in the same dtype, or ``None``.
        act: One of ``ACTIVATIONS``, or ``None``.
        features: The device.

    Returns:
        ``[…, O]``, and the sum ``[…, E]``: new storage, or ``x`` itself without a residual.

    Raises:
        ContractError: Shapes, order and activation do not fit each other.
    """
    before = (residual, norm_weight, norm_bias, eps, order)
    if isinstance(x, PartialProduct):
        normed, total = add_norm(x, *before, features=features)
        _check(normed, weight, bias, act)
        config = _choose(normed, weight, features, norm=True, act=act is not None)
        return _project(normed, weight, bias, act, config, features), total
    _check(x, weight, bias, act)
    if _is_many(x):
        normed, total = add_norm(x, *before, features=features)
        return _by_torch(normed, weight, bias, act, features), total
    norm = _Norm(*before)
    _check_norm(x, norm)
    config = _choose(x, weight, features, norm=True, act=act is not None)
    if config["form"] == "gemv" and config["fuse"] and _is_held(x, config) and x.numel():
        total = x if residual is None else x.new_empty(x.shape)
        return _gemv_rows(x, weight, bias, act, config, features, norm, total), total
    normed, total = add_norm(x, *before, features=features)
    return _project(normed, weight, bias, act, config, features), total


def _is_many(x: Tensor) -> bool:
    """Whether only torch's own product takes so many rows."""
    return x.numel() > MAX_SKINNY_ROWS * x.shape[-1]


def _by_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None, features: Features
) -> Tensor:
    """Torch's product, and the activation of what it makes."""
    product = functional.linear(x, weight, bias)
    return product if act is None else act_and_mul(product, act, features=features)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> None:
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ContractError(
            f"linear got weights {list(weight.shape)} for {x.shape[-1]} features; pass [N, E]"
        )
    if weight.dtype != x.dtype:
        raise ContractError(
            f"linear got weights of {weight.dtype} for input of {x.dtype}; convert one of them"
        )
    if weight.stride(1) != 1:
        raise ContractError("linear reads weights whose features are adjacent; pass a copy")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ContractError(
            f"linear got a bias of {list(bias.shape)} for {len(weight)} outputs; pass [N]"
        )
    if act is None:
        return
    if act not in ACTIVATIONS:
        raise ContractError(f"no activation '{act}'; known: {', '.join(ACTIVATIONS)}")
    if weight.shape[0] % 2:
        raise ContractError(
            f"weights of a gate and of what it gates are an even number, not {len(weight)}"
        )


def _check_norm(x: Tensor, norm: _Norm) -> None:
    if norm.order not in NORM_ORDERS:
        raise ContractError(
            f"norm_linear has no rounding order '{norm.order}'; known: {', '.join(NORM_ORDERS)}"
        )
    if norm.order != "layer_norm" and (norm.weight is None) != (norm.order == "no_weight"):
        given = "no weight" if norm.weight is None else "a weight"
        raise ContractError(
            f"norm_linear got {given} with order '{norm.order}'; pass what it names"
        )
    if norm.bias is not None and norm.order != "layer_norm":
        raise ContractError(f"order '{norm.order}' has no bias; pass None")
    for what, vector in (("weight", norm.weight), ("bias", norm.bias)):
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ContractError(
                f"the norm got a {what} of {list(vector.shape)} for {x.shape[-1]} features; "
                "pass [E]"
            )
        if vector is not None and vector.stride(0) != 1:  # a copy here would be read too early
            raise ContractError(f"the norm reads a {what} that is contiguous; pass a copy")
    residual = norm.residual
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ContractError(
            f"the norm got a residual {list(residual.shape)} of {residual.dtype} for "
            f"{list(x.shape)} of {x.dtype}; pass the same shape and dtype"
        )


def _choose(
    x: Tensor, weight: Tensor, features: Features, *, norm: bool, act: bool
) -> dict[str, Any]:
    """Form and sizes; with them ``m``, the number of rows."""
    n, k = weight.shape
    rows = x.numel() // max(k, 1)
    config = configs.choose("linear", features, n=n, k=k, m=rows, norm=norm, act=act)
    limit = {"gemv": MAX_GEMV_ROWS, "skinny": MAX_SKINNY_ROWS, "torch": rows}
    if rows > limit.get(config["form"], -1):
        raise ContractError(
            f"the configuration of linear says form '{config['form']}' for {rows} rows; forms "
            f"are gemv up to {MAX_GEMV_ROWS} rows, skinny up to {MAX_SKINNY_ROWS}, and torch"
        )
    return {**config, "m": rows}


def _project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str | None,
    config: dict[str, Any],
    features: Features,
) -> Tensor:
    """The layer and its activation, in the form that was chosen."""
    outputs = weight.shape[0] // (1 if act is None else 2)
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], outputs))
    if config["form"] == "gemv":
        return _gemv_rows(x, weight, bias, act, config, features, None, x)
    if config["form"] == "skinny":
        return _skinny_rows(x, weight, bias, act, config, features)
    return _by_torch(x, weight, bias, act, features)


def _as_rows(x: Tensor) -> tuple[Tensor, int]:
    """``[M, E]`` with adjacent features, and the step from row to row."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    # A single row may have any step; one that depends on it would compile once more.
    return rows, rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


def _is_held(x: Tensor, config: dict[str, Any]) -> bool:
    """Whether a program keeps all its input in registers."""
    size = power_of_two(config["m"]) * x.shape[-1] * x.element_size()
    return bool(size <= _HELD_BYTES * 32 * config["num_warps"])


def _gemv_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str | None,
    config: dict[str, Any],
    features: Features,
    norm: _Norm | None,
    total: Tensor,
) -> Tensor:
    """Launch ``_gemv``; ``total`` is written if there is a residual."""
    n, size = weight.shape
    outputs, least = (n, 1) if act is None else (n // 2, 2)
    out = x.new_empty((*x.shape[:-1], outputs))
    rows, x_row = _as_rows(x)
    count = rows.shape[0]
    residual, residual_row = None, x_row
    if norm is not None and norm.residual is not None:
        residual, residual_row = _as_rows(norm.residual)
    block = max(config["rows"], least)
    chunk = min(config["chunk"], power_of_two(size))
    tiles = min(config["tiles"], cdiv(outputs, block // least))
    steps = tiles * cdiv(size, chunk)
    _gemv[(cdiv(outputs, block // least * tiles),)](
        rows, residual,
        None if norm is None else norm.weight, None if norm is None else norm.bias,
        weight, None if bias is None else bias.contiguous(), out, total,
        0.0 if norm is None else norm.eps, count,
        x_row, residual_row, weight.stride(0),
        N=n, E=size, INVERSE_E=1.0 / size, M=power_of_two(count), ROWS=block,
        CHUNK=chunk, TILES=tiles, DEPTH=min(config["depth"], steps),
        HOLD=_is_held(x, config), ORDER=None if norm is None else norm.order, ACT=act,
        EVICT=config["evict"], num_warps=config["num_warps"], num_stages=1,
        enable_fp_fusion=False, **features.chain.arguments(config["release"]),
    )  # fmt: skip
    return out


def _skinny_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str | None,
    config: dict[str, Any],
    features: Features,
) -> Tensor:
    """The form ``skinny``, its parts added."""
    product = _skinny_parts(x, weight, bias, act, config, features)
    if isinstance(product, Tensor):
        return product
    n = weight.shape[0]
    outputs, least = (n, 1) if act is None else (n // 2, 2)
    out = x.new_empty((*x.shape[:-1], outputs))
    splits, count = product.parts.shape[0], out.numel() // outputs
    columns = min(_ADD_COLUMNS, power_of_two(n))
    _add_splits[(cdiv(outputs, columns // least), count)](
        product.parts, product.bias, out, count, N=n, SPLITS=splits, BLOCK_N=columns, ACT=act,
        num_warps=2, **features.chain.arguments(),
    )  # fmt: skip
    return out


def _skinny_parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str | None,
    config: dict[str, Any],
    features: Features,
) -> Tensor | PartialProduct:
    """Launch ``_skinny``: all of it, or the parts before bias and activation."""
    n, size = weight.shape
    outputs, least = (n, 1) if act is None else (n // 2, 2)
    rows, x_row = _as_rows(x)
    count = rows.shape[0]
    padded = max(16, power_of_two(count))
    width, depth, splits = config["block_n"], config["block_k"], config["splits"]
    splits = min(splits, cdiv(size, depth))
    # Numbers of four bytes take twice the registers, for which no sizes were sought.
    most = cdiv(cdiv(size, depth), splits) if x.element_size() <= 2 else 0
    early = min(int(config["early"]), most)
    bias = None if bias is None else bias.contiguous()
    out = parts = None
    if splits > 1:
        shape = (splits, *x.shape[:-1], n)
        parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    else:
        out = x.new_empty((*x.shape[:-1], outputs))
    stages = features.shared_bytes // ((width + padded) * depth * x.element_size())
    _skinny[(cdiv(outputs, width // least), splits)](
        rows, weight, bias, out, parts, count, x_row, weight.stride(0),
        N=n, E=size, BLOCK_M=padded, BLOCK_N=width, BLOCK_K=depth, SPLITS=splits,
        SWAP=config["swap"], EARLY=early, ACT=act, EVICT=config["evict"],
        num_warps=config["num_warps"],
        num_stages=max(1, min(config["num_stages"], stages - early)),
        **features.chain.arguments(config["release"]),
    )  # fmt: skip
    if parts is not None:
        return PartialProduct(parts=parts, bias=bias, dtype=x.dtype)
    assert out is not None
    return out


@triton.jit
def _nothing_yet():
    """A tuple that grows; its type is not that of an empty one."""
    return ()


@triton.jit
def _weight_row(first, ROWS: tl.constexpr, N: tl.constexpr, ACT: tl.constexpr):
    """Rows of the weights that make the outputs from ``first`` on.

    With an activation those of a gate and of what it gates take turns, so that the two halves
    of a sum can be parted where they lie.  Rows behind the last are the last once more.
    """
    place = tl.arange(0, ROWS)
    if ACT is None:
        row = tl.minimum(first + place, N - 1)
    else:
        row = tl.minimum(first + place // 2, N // 2 - 1) + place % 2 * (N // 2)
    return row


@triton.jit
def _finish(sums, bias, row, dtype: tl.constexpr, ACT: tl.constexpr):
    """Sums ``[M, N]`` of the weights' ``row`` to outputs; rounds as separate layers do."""
    if bias is not None:
        sums += tl.load(bias + row).to(tl.float32)[None, :]
    result = sums.to(dtype)
    if ACT is not None:
        pairs = tl.reshape(result, (result.shape[0], result.shape[1] // 2, 2))
        gate, up = tl.split(pairs)
        gate = activate(gate.to(tl.float32), ACT).to(dtype)
        result = (gate.to(tl.float32) * up.to(tl.float32)).to(dtype)
    return result


@triton.jit
def _chunk(vector, part: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr):
    """``[CHUNK]`` elements of a vector, zeros behind its end."""
    column = part * CHUNK + tl.arange(0, CHUNK)
    if (part + 1) * CHUNK <= E:
        chunk = tl.load(vector + column)
    else:
        chunk = tl.load(vector + column, mask=column < E, other=0.0)
    return chunk


@triton.jit
def _chunks(vector, E: tl.constexpr, CHUNK: tl.constexpr):
    """All chunks of a vector."""
    parts = _nothing_yet()
    for part in tl.static_range((E + CHUNK - 1) // CHUNK):
        parts = parts + (_chunk(vector, part, E, CHUNK),)
    return parts


@triton.jit
def _tile(
    weight, weight_row, step: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr, ACT: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """``[ROWS, CHUNK]`` weights of one step of this program."""
    parts: tl.constexpr = (E + CHUNK - 1) // CHUNK
    outputs: tl.constexpr = ROWS if ACT is None else ROWS // 2
    row = _weight_row((tl.program_id(0) * TILES + step // parts) * outputs, ROWS, N, ACT)
    column = step % parts * CHUNK + tl.arange(0, CHUNK)
    place = weight + row.to(tl.int64)[:, None] * weight_row + column[None, :]
    if (step % parts + 1) * CHUNK <= E:
        tile = tl.load(place, eviction_policy=EVICT)
    else:
        tile = tl.load(place, mask=(column < E)[None, :], other=0.0, eviction_policy=EVICT)
    return tile


@triton.jit
def _norm_row(
    row, scales, shifts, eps, E: tl.constexpr, INVERSE_E: tl.constexpr, CHUNK: tl.constexpr,
    ORDER: tl.constexpr,
):  # fmt: skip
    """Norm the chunks of one row, rounded step by step as ``bedplate_triton.norm`` does."""
    parts: tl.constexpr = (E + CHUNK - 1) // CHUNK
    dtype: tl.constexpr = row[0].dtype
    mean = 0.0
    if ORDER == "layer_norm":
        sums = tl.zeros([CHUNK], tl.float32)
        for part in tl.static_range(parts):
            sums += row[part].to(tl.float32)
        mean = tl.sum(sums, 0) * INVERSE_E
    squares = tl.zeros([CHUNK], tl.float32)
    for part in tl.static_range(parts):
        wide = row[part].to(tl.float32)
        if ORDER == "layer_norm":
            wide = tl.where(part * CHUNK + tl.arange(0, CHUNK) < E, wide - mean, 0.0)
        squares += wide * wide
    factor = tl.rsqrt(tl.sum(squares, 0) * INVERSE_E + eps)
    normed = _nothing_yet()
    for part in tl.static_range(parts):
        wide = row[part].to(tl.float32)
        if ORDER == "layer_norm":
            wide = wide - mean
        wide = wide * factor
        if scales is not None:
            wide = weigh(wide, scales[part].to(tl.float32), ORDER, dtype)
        if shifts is not None:
            wide = wide + shifts[part].to(tl.float32)
        normed = normed + (wide.to(dtype),)
    return normed


@triton.jit
def _input_row(
    x, residual, total, m: tl.constexpr, count, x_row, residual_row,
    E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Chunks of row ``m``, with the residual added; the first program writes the sum."""
    dtype: tl.constexpr = x.dtype.element_ty
    index = 0 if m == 0 else tl.minimum(m, count - 1)  # behind the last row, the last again
    row = _chunks(x + index * x_row, E, CHUNK)
    if residual is not None:
        added = _nothing_yet()
        other = _chunks(residual + index * residual_row, E, CHUNK)
        for part in tl.static_range((E + CHUNK - 1) // CHUNK):
            wide = other[part].to(tl.float32) + row[part].to(tl.float32)
            added = added + (wide.to(dtype),)
        if tl.program_id(0) == 0:
            for part in tl.static_range((E + CHUNK - 1) // CHUNK):
                column = part * CHUNK + tl.arange(0, CHUNK)
                tl.store(total + index * E + column, added[part], mask=column < E)
        row = added
    return row


# The number of rows changes from step to step: specialised, it would compile while serving.
@triton.jit(do_not_specialize=["count"])
def _gemv(
    x, residual, norm_weight, norm_bias, weight, bias, out, total, eps, count,
    x_row, residual_row, weight_row,
    N: tl.constexpr, E: tl.constexpr, INVERSE_E: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr, DEPTH: tl.constexpr,
    HOLD: tl.constexpr, ORDER: tl.constexpr, ACT: tl.constexpr, EVICT: tl.constexpr,
    WAIT: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """``TILES`` times ``ROWS`` rows of the weights with up to M rows of the input.

    A step is one tile of ``ROWS`` by ``CHUNK``; the loads of ``DEPTH`` steps are in flight.
    """
    RELEASE()
    parts: tl.constexpr = (E + CHUNK - 1) // CHUNK
    steps: tl.constexpr = parts * TILES
    outputs: tl.constexpr = ROWS if ACT is None else ROWS // 2
    total_outputs: tl.constexpr = N if ACT is None else N // 2
    dtype: tl.constexpr = out.dtype.element_ty
    ahead = _nothing_yet()
    for step in tl.static_range(DEPTH):
        ahead = ahead + (_tile(weight, weight_row, step, N, E, ROWS, CHUNK, TILES, ACT, EVICT),)
    scales = None
    if norm_weight is not None:
        scales = _chunks(norm_weight, E, CHUNK)
    shifts = None
    if norm_bias is not None:
        shifts = _chunks(norm_bias, E, CHUNK)
    WAIT()
    held = _nothing_yet()
    if HOLD:
        for m in tl.static_range(M):
            row = _input_row(x, residual, total, m, count, x_row, residual_row, E, CHUNK)
            if ORDER is not None:
                row = _norm_row(row, scales, shifts, eps, E, INVERSE_E, CHUNK, ORDER)
            held = held + (row,)

    for tile in tl.static_range(TILES):
        sums = _nothing_yet()
        for _ in tl.static_range(M):
            sums = sums + (tl.zeros([ROWS, CHUNK], tl.float32),)
        for part in tl.static_range(parts):
            if tile * parts + part + DEPTH < steps:
                ahead = ahead + (
                    _tile(
                        weight, weight_row, tile * parts + part + DEPTH,
                        N, E, ROWS, CHUNK, TILES, ACT, EVICT,
                    ),
                )  # fmt: skip
            wide = ahead[0].to(tl.float32)
            ahead = ahead[1:]
            grown = _nothing_yet()
            for m in tl.static_range(M):
                if HOLD:
                    values = held[m][part]
                else:
                    index = 0 if m == 0 else tl.minimum(m, count - 1)
                    values = _chunk(x + index * x_row, part, E, CHUNK)
                grown = grown + (tl.fma(wide, values.to(tl.float32)[None, :], sums[m]),)
            sums = grown
        first = (tl.program_id(0) * TILES + tile) * outputs
        row = _weight_row(first, ROWS, N, ACT)
        place = first + tl.arange(0, outputs)[None, :]
        for m in tl.static_range(M):
            result = _finish(tl.sum(sums[m], 1)[None, :], bias, row, dtype, ACT)
            tl.store(
                out + m * total_outputs + place,
                result,
                mask=(place < total_outputs) & (m < count),
            )


@triton.jit(do_not_specialize=["count"])
def _skinny(
    x, weight, bias, out, partial, count, x_row, weight_row,
    N: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, SWAP: tl.constexpr, EARLY: tl.constexpr,
    ACT: tl.constexpr, EVICT: tl.constexpr, WAIT: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """``BLOCK_N`` rows of the weights with all rows of the input, over one split of E.

    ``SWAP`` makes the weights the first operand, of which matrix units want many rows;
    ``EARLY`` tiles of them are read before the kernel may read its input.
    """
    RELEASE()
    outputs: tl.constexpr = BLOCK_N if ACT is None else BLOCK_N // 2
    total_outputs: tl.constexpr = N if ACT is None else N // 2
    parts: tl.constexpr = (E + BLOCK_K - 1) // BLOCK_K
    share: tl.constexpr = (parts + SPLITS - 1) // SPLITS
    whole: tl.constexpr = share * SPLITS * BLOCK_K == E
    first = tl.program_id(0) * outputs
    row = _weight_row(first, BLOCK_N, N, ACT)
    m = tl.arange(0, BLOCK_M)
    real = (m < count)[:, None]
    column = tl.program_id(1) * (share * BLOCK_K) + tl.arange(0, BLOCK_K)
    ours = weight + row.to(tl.int64)[:, None] * weight_row + column[None, :]
    theirs = x + m[:, None] * x_row + column[None, :]
    if SWAP:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    tiles = _nothing_yet()
    for part in tl.static_range(EARLY):
        tiles = tiles + (_weights(ours, column, part * BLOCK_K, E, whole, EVICT),)
    WAIT()
    early = _nothing_yet()
    for part in tl.static_range(EARLY):
        early = early + (_rows(theirs, real, column, part * BLOCK_K, E, whole),)
    for part in tl.static_range(EARLY):
        acc = _product(early[part], tiles[part], acc, SWAP)
    for part in tl.range(EARLY, share):
        tile = _weights(ours, column, part * BLOCK_K, E, whole, EVICT)
        values = _rows(theirs, real, column, part * BLOCK_K, E, whole)
        acc = _product(values, tile, acc, SWAP)
    if SWAP:
        acc = tl.trans(acc)

    if SPLITS > 1:
        place = (tl.program_id(1) * count + m).to(tl.int64)[:, None] * N + row[None, :]
        tl.store(partial + place, acc, mask=real)
    else:
        place = first + tl.arange(0, outputs)[None, :]
        result = _finish(acc, bias, row, out.dtype.element_ty, ACT)
        tl.store(
            out + m[:, None] * total_outputs + place,
            result,
            mask=real & (place < total_outputs),
        )


@triton.jit
def _weights(ours, column, step, E: tl.constexpr, WHOLE: tl.constexpr, EVICT: tl.constexpr):
    """A tile ``[N, K]`` of weights; zeros behind the features, if any tile reaches there."""
    if WHOLE:
        return tl.load(ours + step, eviction_policy=EVICT)
    inside = (column + step < E)[None, :]
    return tl.load(ours + step, mask=inside, other=0.0, eviction_policy=EVICT)


@triton.jit
def _rows(theirs, real, column, step, E: tl.constexpr, WHOLE: tl.constexpr):
    """The same of the input, ``[M, K]``; zeros where there is no row."""
    mask = real
    if not WHOLE:
        mask &= (column + step < E)[None, :]
    return tl.load(theirs + step, mask=mask, other=0.0)


@triton.jit
def _product(values, tile, acc, SWAP: tl.constexpr):
    """``acc`` plus the product of input ``[M, K]`` and weights ``[N, K]``."""
    if SWAP:
        acc = tl.dot(tile, tl.trans(values), acc, input_precision="ieee")
    else:
        acc = tl.dot(values, tl.trans(tile), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["count"])
def _add_splits(
    partial, bias, out, count,
    N: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, ACT: tl.constexpr,
    WAIT: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """Some outputs of one row: the sum of its splits, always in the same order."""
    RELEASE()
    outputs: tl.constexpr = BLOCK_N if ACT is None else BLOCK_N // 2
    total_outputs: tl.constexpr = N if ACT is None else N // 2
    first = tl.program_id(0) * outputs
    m = tl.program_id(1)
    row = _weight_row(first, BLOCK_N, N, ACT)
    WAIT()
    total = tl.zeros([BLOCK_N], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + (split * count + m).to(tl.int64) * N + row)
    place = first + tl.arange(0, outputs)[None, :]
    result = _finish(total[None, :], bias, row, out.dtype.element_ty, ACT)
    tl.store(out + m * total_outputs + place, result, mask=place < total_outputs)
