# SPDX-License-Identifier: Apache-2.0
"""What a backend's graph runner is built from.

``bedplate.graph.GraphRunner`` owns the generic life of graphs; a backend subclasses it and
adds device primitives only.
"""

from __future__ import annotations

__all__ = ["CompileRequest", "GraphRunnerRequest"]

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.batch.forward_mode import CaptureHiddenMode
    from bedplate.contract.attention import AttentionBackend
    from bedplate.contract.decisions import Decision
    from bedplate.contract.runtime import DeviceRuntime


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRunnerRequest:
    """Everything a graph runner needs.

    Attributes:
        runtime: The activated device.
        forward: Runs the model on a prepared batch, ``(ForwardBatch) → LogitsOutput``;
            allocation inside is fine, synchronisation is not.
        attention: Told to prepare before each capture and replay.
        capture_sizes: Request counts to capture, ascending.
        hidden_modes: Hidden-state modes that the server may be asked for.
        max_pages: Columns of the page table (1 when the backend does not use it).
        index_dtype: Name of the torch dtype of ``out_cache_loc``.
        record: Receives a decision for every bucket that is dropped and why.
        begin: Recorded before attention's own preparation: what moves the static slots on
            from one replay to the next; ``None`` where every batch is loaded.
        progress: Told (done, total) while capturing.
        options: The backend's own settings.
    """

    runtime: DeviceRuntime
    forward: Callable[[ForwardBatch], Any]
    attention: AttentionBackend
    capture_sizes: tuple[int, ...]
    hidden_modes: tuple[CaptureHiddenMode, ...]
    index_dtype: str
    record: Callable[[Decision], None]
    begin: Callable[[ForwardBatch], None] | None = None
    progress: Callable[[int, int], None] | None = None
    max_pages: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileRequest:
    """Asks a backend how to compile a callable.

    Attributes:
        function: What to compile.
        dynamic: Whether sizes vary between calls.
        name: For logs and decisions.
    """

    function: Callable[..., Any]
    dynamic: bool = False
    name: str = "model"
