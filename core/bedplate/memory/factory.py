# SPDX-License-Identifier: Apache-2.0
"""The core's own storage and slots, used where a backend's hook returns ``None``."""

from __future__ import annotations

__all__ = ["make_allocator", "make_kv_pool"]

from typing import TYPE_CHECKING

from bedplate.memory.allocator import PagedAllocator
from bedplate.memory.kv_pool import LayeredKVPool

if TYPE_CHECKING:
    from bedplate.contract.memory import AllocatorRequest, KVPoolRequest


def make_kv_pool(request: KVPoolRequest) -> LayeredKVPool:
    """Keys and values of every call of a model, in plain torch."""
    return LayeredKVPool(request)


def make_allocator(request: AllocatorRequest) -> PagedAllocator:
    """The paged allocator; its slots are host int32 whatever the device's index dtype."""
    return PagedAllocator(request.num_tokens, request.page_size)
