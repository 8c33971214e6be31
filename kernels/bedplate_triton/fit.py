# SPDX-License-Identifier: Apache-2.0
"""Whether launch sizes fit a device, judged before anything is compiled.

A compiler finds out at the first launch at the earliest, which may be the first request.
The figures here are upper bounds of what compilers take; ``kernels/tests/test_fit.py`` holds
them against every launch of every case.  Called by ``configs``.
"""

from __future__ import annotations

__all__ = ["MOST_THREADS", "refusal", "shared_bytes"]

from typing import TYPE_CHECKING, Any

from bedplate_triton.sizes import column_blocks, power_of_two

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bedplate_triton.features import Features

MOST_THREADS = 1024
"""Of one program, on every device."""


def refusal(op: str, sizes: Mapping[str, Any], key: Mapping[str, Any], features: Features) -> str:
    """Why sizes do not fit; empty if they do.

    Args:
        op: Name of the operation.
        sizes: Of its launch, as its file gives them.
        key: Facts of the use, as ``configs.choose`` got them.
        features: The device.
    """
    warps = max((value for name, value in sizes.items() if name.endswith("warps")), default=0)
    if warps * features.wave > MOST_THREADS:
        return f"{warps} warps of {features.wave} are more than {MOST_THREADS:,} threads"
    wanted = shared_bytes(op, sizes, key, features)
    if wanted > features.shared_bytes:
        have = f"{features.shared_bytes:,}"
        return f"up to {wanted:,} bytes of shared memory are wanted, of which there are {have}"
    return ""


def shared_bytes(
    op: str, sizes: Mapping[str, Any], key: Mapping[str, Any], features: Features
) -> int:
    """Shared memory of one program, at most; 0 for operations that need next to none."""
    estimate = _ESTIMATES.get(op)
    return 0 if estimate is None else int(estimate(sizes, key, features))


def _decode(sizes: Mapping[str, Any], key: Mapping[str, Any], features: Features) -> int:
    """Tiles of keys and values in flight; queries join them where there are many."""
    if features.shared_operands and sizes["BLOCK_G"] >= _MANY_ROWS:
        rows = {**sizes, "BLOCK_M": sizes["BLOCK_G"]}
        return _extend(rows, {**key, "bytes": key["kv_bytes"]}, features)
    return _tiles(sizes, key, sizes["num_stages"] - 1, key["kv_bytes"]) + _DECODE_SLACK


def _extend(sizes: Mapping[str, Any], key: Mapping[str, Any], features: Features) -> int:
    """The same and the tile of queries, which passes through before them or stays."""
    queries = int(sizes["BLOCK_M"] * sum(column_blocks(key["head_dim"])) * key["bytes"])
    stages = sizes["num_stages"]
    if features.shared_operands:
        return _tiles(sizes, key, stages, key["bytes"]) + queries + _EXTEND_SLACK
    return max(_tiles(sizes, key, stages - 1, key["bytes"]), queries) + _EXTEND_SLACK


def _tiles(sizes: Mapping[str, Any], key: Mapping[str, Any], stages: int, size: int) -> int:
    return int(max(1, stages) * sizes["BLOCK_N"] * _width(key) * size)


def _multiply(sizes: Mapping[str, Any], key: Mapping[str, Any], features: Features) -> int:
    """Tiles of both operands."""
    rows = sizes["BLOCK_M"] + sizes["BLOCK_N"]
    return int(sizes["num_stages"] * rows * sizes["BLOCK_K"] * key["bytes"])


def _width(key: Mapping[str, Any]) -> int:
    """Columns of a key and a value; of a key alone where values are a part of it."""
    main, tail = column_blocks(key["head_dim"])
    value = max(16, power_of_two(key["value_dim"]))
    latent = tail and value == main and key["group"] > 1
    return main + tail + (0 if latent else value)


_MANY_ROWS = 64
"""From so many on, matrix units that can read operands from shared memory do."""
_DECODE_SLACK, _EXTEND_SLACK = 10 << 10, 3 << 10
"""Bytes for what passes between warps."""

_ESTIMATES: Mapping[str, Callable[..., int]] = {
    "decode_attention": _decode,
    "extend_attention": _extend,
    "invariant": _multiply,
}
