# SPDX-License-Identifier: Apache-2.0
"""How many tokens the cache holds.

Pure, but for the decision that it returns: bytes in, tokens out.
"""

from __future__ import annotations

__all__ = ["MemoryBudget", "choose_pool_size"]

from dataclasses import dataclass

from bedplate.contract.decisions import Candidate, Decision
from bedplate.errors import DeviceMemoryError
from bedplate.memory.sizing import profile_max_num_tokens

_GIB = 1 << 30
_MOST_UNASKED_BYTES = {True: 4 * _GIB, False: None}
"""Memory shared with everything else on the machine is taken modestly unless asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """What the size of the cache depends on.

    Attributes:
        free_before_load_bytes: Free device memory before the weights came.
        free_bytes: Free now.
        graph_bytes: What graphs will take.
        cell_bytes: Bytes of one token in all calls together.
        unified: Whether the memory is the host's.
        mem_fraction: Share for weights, graphs and cache.
    """

    free_before_load_bytes: int
    free_bytes: int
    graph_bytes: int
    cell_bytes: int
    unified: bool
    mem_fraction: float


def choose_pool_size(
    budget: MemoryBudget, *, most_useful: int, page_size: int, asked: int | None
) -> tuple[int, Decision]:
    """Tokens of the cache, a multiple of ``page_size``, and why so many.

    Args:
        budget: Memory.
        most_useful: Tokens beyond which nothing is gained: every request at full length.
        page_size: Tokens a page.
        asked: ``max_total_tokens``, if given.

    Raises:
        DeviceMemoryError: Not one page fits, or fewer than were asked for.
    """
    cell = max(1, budget.cell_bytes)
    fitting = profile_max_num_tokens(
        free_bytes=budget.free_bytes - budget.graph_bytes,
        total_before_load_bytes=budget.free_before_load_bytes,
        mem_fraction=budget.mem_fraction,
        cell=cell,
    )
    limits = {"memory": fitting, "all requests at full length": most_useful}
    modest = _MOST_UNASKED_BYTES[budget.unified]
    if modest is not None and asked is None:
        limits["a modest share of the host's memory"] = modest // cell
    if asked is not None:
        limits["max_total_tokens"] = asked
    _require(budget, fitting, min(asked or page_size, most_useful), cell)
    binding = min(limits, key=lambda name: limits[name])
    tokens = max(limits[binding], page_size) // page_size * page_size
    candidates = tuple(
        Candidate(
            name=f"{count:,} tokens",
            verdict="chosen" if name == binding else "refused",
            reason=f"{'bounded by' if name == binding else 'bound of'} {name}",
        )
        for name, count in sorted(limits.items(), key=lambda item: item[1])
    )
    detail = {
        "bytes a token": str(cell),
        "cache": f"{tokens * cell / _GIB:.2f} GiB",
        "free": f"{budget.free_bytes / _GIB:.2f} GiB",
        "graphs": f"{budget.graph_bytes / _GIB:.2f} GiB",
    }
    chosen = f"{limits[binding]:,} tokens"
    return tokens, Decision(
        point="kv_tokens", chosen=chosen, candidates=candidates, detail=detail
    )


def _require(budget: MemoryBudget, fitting: int, wanted: int, cell: int) -> None:
    if fitting >= wanted:
        return
    raise DeviceMemoryError(
        f"The cache needs {wanted:,} tokens of {cell:,} bytes ({wanted * cell / _GIB:.2f} "
        f"GiB), but {max(0, fitting):,} fit: {budget.free_bytes / _GIB:.2f} GiB are free, "
        f"graphs take {budget.graph_bytes / _GIB:.2f}, and {1 - budget.mem_fraction:.0%} of "
        f"{budget.free_before_load_bytes / _GIB:.2f} GiB is kept back. Raise --mem-fraction, "
        "lower --max-total-tokens, or take --kv-dtype of fewer bytes",
        asked=wanted * cell,
        free=budget.free_bytes,
        settings=("mem_fraction", "max_total_tokens", "kv_dtype"),
    )
