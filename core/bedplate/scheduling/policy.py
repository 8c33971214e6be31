# SPDX-License-Identifier: Apache-2.0
"""Who goes first, who gives way, and where a long prompt is cut.

Pure integers, apart from the scheduler so that the rules are tables in tests.
"""

from __future__ import annotations

__all__ = ["chunk_end", "pages_for", "rank"]


def rank(priority: int, number: int) -> tuple[int, int]:
    """Sort key of a request: smaller goes first, the largest gives way first.

    Args:
        priority: Higher is more urgent.
        number: Order of arrival.
    """
    return (-priority, number)


def chunk_end(start: int, total: int, budget: int, page_size: int) -> int:
    """Where the pass that begins at ``start`` stops within one prompt.

    Args:
        start: Tokens that are computed already; a multiple of ``page_size``.
        total: Tokens to compute.
        budget: Tokens that this pass may still take.
        page_size: An unfinished chunk ends at a multiple of it.

    Returns:
        ``total``, or a page boundary, or ``start`` when not even one page fits the budget.
    """
    if total - start <= budget:
        return total
    return max(start, (start + budget) // page_size * page_size)


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold ``num_tokens`` from a page boundary on."""
    return -(-num_tokens // page_size)
