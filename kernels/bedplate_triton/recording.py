# SPDX-License-Identifier: Apache-2.0
"""Recording a pass into a graph of torch, and what a recording that breaks off leaves behind.

Called by the graph runners of backends.
"""

from __future__ import annotations

__all__ = ["recording"]

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def recording(
    graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream
) -> Iterator[None]:
    """Record what is launched inside; other threads may go on using the device meanwhile.

    Where it breaks off, torch's allocator is told that nothing is recorded any more.  It would
    believe so for ever, and give no cached memory back as long as it does.

    Args:
        graph: Empty.
        pool: Handle of the pool that its memory comes from.
        stream: Where it is recorded.
    """
    try:
        with torch.cuda.graph(
            graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        ):
            yield
    except BaseException:
        with suppress(RuntimeError):  # it knows already
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
