# SPDX-License-Identifier: Apache-2.0
"""Logging that many processes can share without repeating each other."""

from __future__ import annotations

__all__ = ["RankZeroFilter"]

import logging


class RankZeroFilter(logging.Filter):
    """Passes INFO on rank 0 only, and every other level on every rank.

    Add it once to a module's logger.

    Args:
        is_rank_zero: Whether this process speaks for all.
    """

    def __init__(self, is_rank_zero: bool) -> None:
        super().__init__()
        self.is_rank_zero = is_rank_zero

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether ``record`` is written."""
        return self.is_rank_zero or record.levelno != logging.INFO
