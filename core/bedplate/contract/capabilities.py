# SPDX-License-Identifier: Apache-2.0
"""Capabilities: questions with conservative defaults, read before anything is built.

A field exists only if the conformance kit can test it; everything else is a fact.  An empty
record is honest: it claims float32, page size 1 and nothing more.
"""

from __future__ import annotations

__all__ = [
    "DETERMINISM_CLASSES",
    "BackendCapabilities",
    "DeterminismClass",
    "GraphCapabilities",
    "MemoryCapabilities",
]

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Mapping

DeterminismClass = Literal["none", "run_to_run", "batch_invariant"]
DETERMINISM_CLASSES: tuple[DeterminismClass, ...] = get_args(DeterminismClass)
"""Weakest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphCapabilities:
    """What recorded graphs can do.

    Attributes:
        supported: Whether the backend offers a graph runner at all.
        default: Whether graphs are on unless the user says otherwise.
        stable_addresses: Replay reads inputs at the addresses of capture.
        update_parameters: Host integers can be changed between replays.
        shared_pool: Graphs may share one memory pool.
        sampling_inside: Sampling may be recorded too.
        reason: Why ``default`` is off, for the decision record.
    """

    supported: bool = False
    default: bool = False
    stable_addresses: bool = True
    update_parameters: bool = False
    shared_pool: bool = False
    sampling_inside: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCapabilities:
    """How device memory behaves.

    Attributes:
        unified: Host and device address the same memory: a host array *is* a device
            tensor, and no staging copy is made.
        asynchronous: Work is queued and the host goes on; otherwise every call has
            finished when it returns, and overlap gains nothing.
        pinned_host: Page-locked host memory makes copies asynchronous.
        page_sizes: Tokens a page that attention can use; the first is preferred.
        index_dtype: Integer type of KV slots, ``int32`` or ``int64``.
    """

    unified: bool = False
    asynchronous: bool = False
    pinned_host: bool = False
    page_sizes: tuple[int, ...] = (1,)
    index_dtype: Literal["int32", "int64"] = "int64"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendCapabilities:
    """What one activated backend can do on its device.

    Attributes:
        device_type: The torch device string without index.
        arch: Architecture word, such as ``x86_64-v4``.
        compute_dtypes: Names of torch dtypes that models may run in, best first.
        kv_dtypes: Names of torch dtypes that keys and values may be stored in.
        graph: Recorded graphs.
        memory: Memory and paging.
        determinism: Strongest promise over repeated runs and other batch members.
        facts: Driver, toolkit, firmware and the like; shown, never decided upon.
    """

    device_type: str
    arch: str = ""
    compute_dtypes: tuple[str, ...] = ("float32",)
    kv_dtypes: tuple[str, ...] = ("float32",)
    graph: GraphCapabilities = GraphCapabilities()
    memory: MemoryCapabilities = MemoryCapabilities()
    determinism: DeterminismClass = "none"
    facts: Mapping[str, str] = field(default_factory=dict)
