# SPDX-License-Identifier: Apache-2.0
"""What the decoder of ``GraphBench`` attends by: the kit's attention, or an engine's choice.

The kit's own depends on every slot of a batch and works on any device, so it shows the graph
runner alone.  An engine's choice comes through the doors that an engine uses: the backend's
pool, whoever serves the calls best, whole pages.  A runner that renews host integers of its own
operators before each replay can record nothing else.

Shapes: B requests, D head size.
"""

from __future__ import annotations

__all__ = ["BenchAttention", "EngineAttention", "KitAttention", "choose_attention"]

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from bedplate.conformance.cases.attention import DTYPES
from bedplate.contract.attention import (
    AttentionBackend,
    AttentionBuild,
    AttentionCallSpec,
    AttentionProvider,
    AttentionRequest,
)
from bedplate.contract.memory import KVPoolRequest
from bedplate.errors import UnsupportedError
from bedplate.memory.factory import make_kv_pool
from bedplate.testing.tiny_decoder import TinyAttention, TinyDecoder

if TYPE_CHECKING:
    from torch import Tensor

    from bedplate.registry.bind import BoundBackend

_ROWS, _LENGTHS = 24, 12
"""Request rows, and how far the lengths of checks reach."""
_CALL = AttentionCallSpec(
    call_id=0, module="attention", num_heads=1, num_kv_heads=1, head_dim=64, value_dim=64,
    scale=0.125,
)  # fmt: skip


class BenchAttention(ABC):
    """An attention, its cache, the rows of requests, and the decoder over them.

    Attributes:
        attention: What the runner records.
        model: The decoder.
        dtype: Name of the dtype of weights and cache.
        req_to_token: ``[rows, width]`` int32; row 0 is all slot 0.
        page_size: Slots that padding may write to, from slot 0 on.
        index_dtype: Name of the dtype of slots.
        cached: Tokens that every request has beyond those that a check asks for.
    """

    attention: AttentionBackend
    model: TinyDecoder
    dtype: str
    req_to_token: Tensor
    page_size: int
    index_dtype: str
    cached: int

    @abstractmethod
    def stored(self) -> list[Tensor]:
        """Keys and values, ``[slots, …, D]``, where they lie."""

    def grow(self) -> None:  # noqa: B027 - where it can be done under the same attention
        """Replace the cache by a larger one with the same contents."""


class KitAttention(BenchAttention):
    """The kit's own, over pages of one token."""

    attention: TinyAttention
    dtype, index_dtype = "float32", "int64"
    page_size, cached = 1, 0

    def __init__(self, bound: BoundBackend) -> None:
        device = str(bound.runtime.device)
        self.attention = TinyAttention(rows=_ROWS, width=_LENGTHS, device=device)
        self.req_to_token = self.attention.req_to_token
        self.model = TinyDecoder(self.attention, device)

    def stored(self) -> list[Tensor]:
        """The attention's own tensors."""
        return [self.attention.keys, self.attention.values]

    def grow(self) -> None:
        """Twice as many slots."""
        self.attention.keys = torch.cat([self.attention.keys] * 2)
        self.attention.values = torch.cat([self.attention.values] * 2)


class EngineAttention(BenchAttention):
    """What an engine would choose for the decoder, in the finest dtype that gives it.

    Requests are so long that the lengths of checks reach over the border of a page.

    Raises:
        UnsupportedError: The backend brings no attention for any dtype.
    """

    def __init__(self, bound: BoundBackend) -> None:
        memory, device = bound.capabilities.memory, bound.runtime.device
        size = self.page_size = memory.page_sizes[0]
        self.index_dtype = memory.index_dtype
        self.dtype, provider = choose_attention(bound)
        self.cached = max(0, size - _LENGTHS // 2)
        pages = -(-(self.cached + _LENGTHS) // size)
        table = torch.arange(_ROWS * pages * size, dtype=torch.int32).view(_ROWS, -1)
        table[0] = 0
        self.req_to_token = table.to(device)
        dtype = getattr(torch, self.dtype)
        request = KVPoolRequest(
            runtime=bound.runtime, calls=(_CALL,), page_size=size, dtype=dtype,
            num_tokens=table.numel() - size,
        )  # fmt: skip
        self._pool = bound.make_kv_pool(request) or make_kv_pool(request)
        self._fill(bound)
        self.attention = provider.build(
            AttentionBuild(
                runtime=bound.runtime,
                calls=(_CALL,),
                kv_pool=self._pool,
                page_size=size,
                req_to_token=self.req_to_token,
                dtype=dtype,
                max_batch_size=_ROWS - 1,
                max_context_len=table.shape[1],
            )
        )
        self.model = TinyDecoder(self.attention, str(device), call=_CALL, dtype=dtype)

    def stored(self) -> list[Tensor]:
        """The pool's live storage."""
        return [self._pool.key(0), self._pool.value(0)]

    def _fill(self, bound: BoundBackend) -> None:
        """Random numbers in every slot but those of page 0."""
        generator = torch.Generator().manual_seed(1)
        slots = torch.arange(self.page_size, self.page_size + self._pool.num_tokens)
        keys, values = (
            torch.randn((len(slots), 1, _CALL.head_dim), generator=generator).to(
                bound.runtime.device
            )
            for _ in range(2)
        )
        slots = slots.to(getattr(torch, self.index_dtype)).to(bound.runtime.device)
        with bound.runtime.inference_guard():
            self._pool.write(0, slots, keys, values)


def choose_attention(bound: BoundBackend) -> tuple[str, AttentionProvider]:
    """The finest dtype that the backend has an attention of its own for, and that attention.

    Raises:
        UnsupportedError: There is none.
    """
    have, refusals = bound.capabilities, []
    for dtype in DTYPES:
        if dtype not in have.compute_dtypes or dtype not in have.kv_dtypes:
            continue
        request = AttentionRequest(
            calls=(_CALL,), dtype=dtype, kv_dtype=dtype, arch=have.arch,
            page_size=have.memory.page_sizes[0],
        )  # fmt: skip
        try:
            chosen = bound.attention_providers.choose_attention(request)
        except UnsupportedError as error:
            refusals.append(error.message)
            continue
        if chosen.provider != "reference":
            return dtype, chosen
    raise UnsupportedError(" ".join(refusals) or "The backend brings no attention of its own.")
