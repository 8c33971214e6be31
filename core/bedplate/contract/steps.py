# SPDX-License-Identifier: Apache-2.0
"""What observers are told about a step."""

from __future__ import annotations

__all__ = ["StepStats"]

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One engine step, after its tokens reached the host.

    Attributes:
        step: Number of the step since start.
        mode: Name of the forward mode.
        num_requests: Requests in the pass.
        num_tokens: New tokens computed.
        graph: Bucket that was replayed, or ``None`` for an eager pass.
        graph_reason: Why no graph was used; empty when one was.
        host_us: Microseconds of host work (planning and applying).
        total_us: Microseconds from planning to applied tokens.
        free_tokens: Free slots afterwards.
        queued: Requests that wait.
    """

    step: int
    mode: str
    num_requests: int
    num_tokens: int
    graph: int | None
    graph_reason: str
    host_us: float
    total_us: float
    free_tokens: int
    queued: int
