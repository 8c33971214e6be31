# SPDX-License-Identifier: Apache-2.0
"""Walking a long cached prefix in chunks, so that its keys never exist all at once.

Attention over the new tokens comes first, then one pass per chunk, merged by
``reference.merge``.  The plan is one frozen part of a batch, made once; nothing counts
through it in place.

Shapes: B requests, n chunks.
"""

from __future__ import annotations

__all__ = [
    "DEFAULT_CHUNK_CAPACITY_TOKENS",
    "PrefixChunks",
    "create_chunked_prefix_cache_kv_indices",
    "get_prefix_chunk_seq_lens",
    "plan_prefix_chunks",
]

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from bedplate.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_CHUNK_CAPACITY_TOKENS: Final = 128 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixChunks:
    """The plan; every request's chunk has the same nominal length.

    Attributes:
        starts: ``[n, B]`` int32 device; first prefix position of each chunk.
        seq_lens: ``[n, B]`` int32 device; tokens of each chunk, 0 past a prefix's end.
        cu_seq_lens: ``[n, B + 1]`` int32 device; their running sums, from 0.
        max_seq_lens: n host integers; longest part within a chunk.
        num_tokens: n host integers; tokens within a chunk, never above the capacity.
        kv_indices: n × ``[num_tokens]`` int32 device; slots to gather.
    """

    starts: Tensor
    seq_lens: Tensor
    cu_seq_lens: Tensor
    max_seq_lens: tuple[int, ...]
    num_tokens: tuple[int, ...]
    kv_indices: tuple[Tensor, ...]

    def __len__(self) -> int:
        """Number of chunks."""
        return len(self.num_tokens)


def plan_prefix_chunks(
    prefix_lens_cpu: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    *,
    capacity: int = DEFAULT_CHUNK_CAPACITY_TOKENS,
) -> PrefixChunks:
    """Cut the batch's prefixes into chunks of at most ``capacity`` tokens together.

    Works on the host and copies once to the device; does not wait for it.

    Args:
        prefix_lens_cpu: ``[B]`` host integers; cached tokens per request.
        req_pool_indices: ``[B]`` device; rows of ``req_to_token``.
        req_to_token: ``[max_reqs, max_context_len]`` int32 device.
        capacity: Most tokens of one chunk, all requests together.

    Raises:
        ConfigError: ``capacity`` does not give every request one token.
    """
    size = len(prefix_lens_cpu)
    if capacity < max(size, 1):
        # Clamping to one token each would silently outgrow what the capacity bounds.
        raise ConfigError(
            f"The prefix chunk capacity is {capacity} tokens, but the batch has {size} "
            "requests and each needs at least one token of every chunk. Raise the capacity "
            "or lower the largest batch size",
            capacity=capacity, batch_size=size,
        )  # fmt: skip
    chunk_len = capacity // max(size, 1)
    longest = int(prefix_lens_cpu.max()) if size else 0
    starts, lens = get_prefix_chunk_seq_lens(
        prefix_lens_cpu, -(-longest // chunk_len), chunk_len
    )
    cu_lens = torch.zeros((len(lens), size + 1), dtype=torch.int32)
    torch.cumsum(lens, 1, dtype=torch.int32, out=cu_lens[:, 1:])
    num_tokens = tuple(cu_lens[:, -1].tolist())
    packed = torch.cat([starts, lens, cu_lens], 1).to(req_to_token.device, non_blocking=True)
    starts, device_lens = packed[:, :size], packed[:, size : 2 * size]
    cu_lens = packed[:, 2 * size :]
    return PrefixChunks(
        starts=starts,
        seq_lens=device_lens,
        cu_seq_lens=cu_lens,
        max_seq_lens=tuple(lens.max(1).values.tolist()) if size else (),
        num_tokens=num_tokens,
        kv_indices=tuple(
            create_chunked_prefix_cache_kv_indices(req_to_token, req_pool_indices, *chunk)
            for chunk in zip(starts, device_lens, cu_lens, num_tokens, strict=True)
        ),
    )


def get_prefix_chunk_seq_lens(
    prefix_lens: Tensor, num_chunks: int, chunk_len: int
) -> tuple[Tensor, Tensor]:
    """First positions and lengths of each chunk, ``[n, B]`` int32 on the input's device."""
    begin = torch.arange(num_chunks, dtype=torch.int32, device=prefix_lens.device) * chunk_len
    starts = begin[:, None].expand(num_chunks, len(prefix_lens)).contiguous()
    return starts, (prefix_lens.to(torch.int32) - starts).clamp_(0, chunk_len)


def create_chunked_prefix_cache_kv_indices(
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    starts: Tensor,
    seq_lens: Tensor,
    cu_seq_lens: Tensor,
    num_tokens: int,
) -> Tensor:
    """Slots of one chunk, request after request; no synchronisation.

    Args:
        req_to_token: ``[max_reqs, max_context_len]`` int32.
        req_pool_indices: ``[B]`` rows.
        starts: ``[B]`` first position.
        seq_lens: ``[B]`` tokens; rows of length 0 add nothing.
        cu_seq_lens: ``[B + 1]`` running sums of ``seq_lens``.
        num_tokens: The last of them, known on the host.

    Returns:
        ``[num_tokens]`` int32.
    """
    # Row b contributes columns starts[b] + 0, 1, …; `shift` turns packed places into columns.
    shift = starts - cu_seq_lens[:-1]
    pairs = torch.stack([req_pool_indices.to(shift.dtype), shift])
    rows, shifts = torch.repeat_interleave(pairs, seq_lens, dim=1, output_size=num_tokens)
    columns = torch.arange(num_tokens, device=shift.device) + shifts
    return req_to_token[rows, columns]
