# SPDX-License-Identifier: Apache-2.0
"""Whether launch sizes fit a device, judged before anything is compiled.

A compiler finds out at the first launch at the earliest, which may be the first request.
The upper figures here are no less than what compilers take: ``kernels/matrix`` holds them
against every launch of every case.  Called by ``configs``.
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


def refusal(
    op: str,
    sizes: Mapping[str, Any],
    key: Mapping[str, Any],
    features: Features,
    *,
    surely: bool = True,
) -> str:
    """Why sizes do not fit; empty if they do.

    Args:
        op: Name of the operation.
        sizes: Of its launch, as its file gives them.
        key: Facts of the use, as ``configs.choose`` got them.
        features: The device.
        surely: Whether sizes that may just fit are refused too.
    """
    warps = max((value for name, value in sizes.items() if name.endswith("warps")), default=0)
    if warps * features.wave > MOST_THREADS:
        return f"{warps} warps of {features.wave} are more than {MOST_THREADS:,} threads"
    least, most = shared_bytes(op, sizes, key, features)
    wanted = most if surely else least
    if wanted > features.shared_bytes:
        how = "up to" if least < most else "all of"
        have = f"{features.shared_bytes:,}"
        return f"{how} {wanted:,} bytes of shared memory are wanted, of which there are {have}"
    return ""


def shared_bytes(
    op: str, sizes: Mapping[str, Any], key: Mapping[str, Any], features: Features
) -> tuple[int, int]:
    """Shared memory of one program, at least and at most; 0 where it is next to none."""
    estimate = _ESTIMATES.get(op)
    return (0, 0) if estimate is None else estimate(sizes, key, features)


def _decode(
    sizes: Mapping[str, Any], key: Mapping[str, Any], features: Features
) -> tuple[int, int]:
    """Tiles of keys and values in flight; queries join them where there are many."""
    joined = features.shared_operands and sizes["BLOCK_G"] >= _MANY_ROWS
    return _attention(sizes, key, sizes["BLOCK_G"], key["kv_bytes"], features, joined)


def _extend(
    sizes: Mapping[str, Any], key: Mapping[str, Any], features: Features
) -> tuple[int, int]:
    """The same, where there are always many."""
    joined = features.shared_operands
    return _attention(sizes, key, sizes["BLOCK_M"], key["bytes"], features, joined)


def _attention(
    sizes: Mapping[str, Any],
    key: Mapping[str, Any],
    rows: int,
    size: int,
    features: Features,
    joined: bool,
) -> tuple[int, int]:
    """Queries stay beside the tiles (``joined``), or pass through before there are any."""
    main, tail = column_blocks(key["head_dim"])
    queries = rows * (main + tail) * size
    stages = max(1, sizes["num_stages"] - features.early_registers)
    tiles = stages * sizes["BLOCK_N"] * _width(key) * size
    least = int(tiles + queries if joined else max(tiles, queries))
    return least, least + (_JOINED_SLACK if joined else _SLACK)


def _multiply(
    sizes: Mapping[str, Any], key: Mapping[str, Any], features: Features
) -> tuple[int, int]:
    """Tiles of both operands; some compilers keep their rows a little apart."""
    rows = sizes["BLOCK_M"] + sizes["BLOCK_N"]
    least = int(sizes["num_stages"] * rows * sizes["BLOCK_K"] * key["bytes"])
    return least, least + _APART


def _width(key: Mapping[str, Any]) -> int:
    """Columns of a key and a value; of a key alone where values are a part of it."""
    main, tail = column_blocks(key["head_dim"])
    value = max(16, power_of_two(key["value_dim"]))
    latent = tail and value == main and key["group"] > 1
    return main + tail + (0 if latent else value)


_MANY_ROWS = 64
"""From so many on, matrix units that can read operands from shared memory do."""
_SLACK, _JOINED_SLACK = 13 << 10, 3 << 10
"""Bytes for what passes between warps."""
_APART = 1 << 10
"""Bytes between rows of tiles."""

_ESTIMATES: Mapping[str, Callable[..., tuple[int, int]]] = {
    "decode_attention": _decode,
    "extend_attention": _extend,
    "invariant": _multiply,
}
