# SPDX-License-Identifier: Apache-2.0
"""The modes' numbers are wire format; their predicates are a table."""

from __future__ import annotations

import pytest

from bedplate.batch.forward_mode import CaptureHiddenMode, ForwardMode

NUMBERS = {
    "EXTEND": 1, "DECODE": 2, "MIXED": 3, "IDLE": 4, "TARGET_VERIFY": 5, "DRAFT_EXTEND": 6,
    "DUMMY_FIRST": 7, "SPLIT_PREFILL": 8,
}  # fmt: skip
TRUE_FOR = {
    "is_prefill": "EXTEND MIXED TARGET_VERIFY DRAFT_EXTEND",
    "is_extend": "EXTEND MIXED TARGET_VERIFY DRAFT_EXTEND",
    "is_decode": "DECODE",
    "is_mixed": "MIXED",
    "is_idle": "IDLE",
    "is_decode_or_idle": "DECODE IDLE",
    "is_target_verify": "TARGET_VERIFY",
    "is_draft_extend": "DRAFT_EXTEND",
    "is_extend_or_draft_extend_or_mixed": "EXTEND MIXED DRAFT_EXTEND",
    "is_graph": "DECODE IDLE TARGET_VERIFY",
    "is_dummy_first": "DUMMY_FIRST",
    "is_split_prefill": "SPLIT_PREFILL",
}


def test_numbers_never_change():
    assert {mode.name: int(mode) for mode in ForwardMode} == NUMBERS
    assert {mode.name: int(mode) for mode in CaptureHiddenMode} == {
        "NULL": 0, "LAST": 1, "FULL": 2,
    }  # fmt: skip


@pytest.mark.parametrize("predicate", TRUE_FOR)
def test_predicates(predicate):
    true = {mode.name for mode in ForwardMode if getattr(mode, predicate)()}
    assert true == set(TRUE_FOR[predicate].split())


def test_no_predicate_is_left_out():
    offered = {name for name in vars(ForwardMode) if name.startswith("is_")}
    assert offered == set(TRUE_FOR)


def test_hidden_modes_are_ordered_by_what_they_keep():
    null, last, full = CaptureHiddenMode
    assert max(null, last) is last
    assert max(full, last) is full
    assert [mode.need_capture() for mode in CaptureHiddenMode] == [False, True, True]
    assert [mode.is_last() for mode in CaptureHiddenMode] == [False, True, False]
    assert [mode.is_full() for mode in CaptureHiddenMode] == [False, False, True]
