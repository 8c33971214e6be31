# SPDX-License-Identifier: Apache-2.0
"""Variables of the environment are proposed and shown; nothing sets them."""

from __future__ import annotations

import pytest

from bedplate_rocm.settings import SETTINGS, decisions, has_expandable_segments, report

KERNARG = "HIP_FORCE_DEV_KERNARG"


def test_what_is_not_set_is_proposed():
    lines = {item.name: item for item in report({})}
    assert lines.keys() == {setting.name for setting in SETTINGS}
    assert (lines[KERNARG].value, lines[KERNARG].status) == ("not set", "warn")
    assert f"Set {KERNARG}=1" in lines[KERNARG].remedy
    record = decisions({})[0]
    assert (record.point, record.chosen) == (f"environment.{KERNARG}", "not set")
    assert [(c.name, c.verdict) for c in record.candidates] == [
        ("not set", "chosen"), ("1", "possible"),
    ]  # fmt: skip


@pytest.mark.parametrize(("value", "others"), [("1", []), ("0", ["1"])])
def test_what_is_set_is_shown(value, others):
    line = report({KERNARG: value})[0]
    assert (line.value, line.status, line.remedy) == (value, "ok", "")
    record = decisions({KERNARG: value})[0]
    assert record.chosen == value
    assert [c.name for c in record.candidates if c.verdict == "possible"] == others


@pytest.mark.parametrize(
    ("environment", "expandable"),
    [
        ({}, False),
        ({"PYTORCH_HIP_ALLOC_CONF": "expandable_segments:True"}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:9,expandable_segments: true"}, True),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, False),
    ],
)  # fmt: skip
def test_expandable_segments_are_seen(environment, expandable):
    assert has_expandable_segments(environment) is expandable
