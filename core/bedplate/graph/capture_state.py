# SPDX-License-Identifier: Apache-2.0
"""Process-wide conditions of capturing: the flag that models read, and the garbage collector.

Apart from the runner because models and memory pools ask for the flag (to fork a side stream
only while capturing) and must not import the runner for that.
"""

from __future__ import annotations

__all__ = ["freeze_gc", "get_is_capture_mode", "model_capture_mode", "pause_gc"]

import gc
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_capturing: ContextVar[bool] = ContextVar("bedplate_graph_capturing", default=False)
_frozen: ContextVar[bool] = ContextVar("bedplate_gc_frozen", default=False)


def get_is_capture_mode() -> bool:
    """Whether the current thread or task is capturing a graph (warm-ups included)."""
    return _capturing.get()


@contextmanager
def model_capture_mode() -> Iterator[None]:
    """Set the flag for a block; the former value returns whatever the block raises."""
    token = _capturing.set(True)
    try:
        yield
    finally:
        _capturing.reset(token)


@contextmanager
def freeze_gc(enable_gc: bool = False) -> Iterator[None]:
    """Keep the collector from walking every live object between captures.

    One full collection comes first, so that nothing collectable is frozen, and one last, of
    what is younger than the block, for what the captures left.  A block inside another leaves
    thawing to the outer; what the application had frozen before stays frozen, and what the
    block leaves is frozen with it.

    Args:
        enable_gc: Leave the collector alone in between.
    """
    gc.collect()
    if enable_gc or _frozen.get():
        yield
        return
    was_frozen = gc.get_freeze_count() > 0
    token = _frozen.set(True)
    gc.freeze()
    try:
        yield
    finally:
        _frozen.reset(token)
        gc.collect()
        if was_frozen:
            gc.freeze()
        else:
            gc.unfreeze()


@contextmanager
def pause_gc() -> Iterator[None]:
    """No collection in a block, where ``freeze_gc``'s two full ones would take longer."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
