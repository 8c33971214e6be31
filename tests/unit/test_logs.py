# SPDX-License-Identifier: Apache-2.0
"""RankZeroFilter: functions 61 and 62."""

from __future__ import annotations

import logging

import pytest

from bedplate.logs import RankZeroFilter


@pytest.mark.parametrize("rank_zero", [True, False])
@pytest.mark.parametrize(
    "level", [logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL]
)
def test_only_info_is_silent_and_only_off_rank_zero(rank_zero, level):
    record = logging.LogRecord("bedplate", level, __file__, 1, "text", (), None)
    passes = RankZeroFilter(rank_zero).filter(record)
    assert passes is (rank_zero or level != logging.INFO)
