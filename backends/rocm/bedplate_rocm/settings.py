# SPDX-License-Identifier: Apache-2.0
"""Environment variables of ROCm that are worth setting: proposed and shown, never set here.

The runtime reads them before any of our code could set them, and they are for the whole
process; so ``bedplate doctor`` and ``bedplate explain`` say what is proposed, what there is,
and why.
"""

from __future__ import annotations

__all__ = ["SETTINGS", "Setting", "decisions", "has_expandable_segments", "report"]

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bedplate.contract import Candidate, Decision, ReportItem

if TYPE_CHECKING:
    from collections.abc import Mapping

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One variable.

    Attributes:
        name: Of the variable.
        value: What is proposed.
        why: What it gains, as a sentence without a full stop.
    """

    name: str
    value: str
    why: str


SETTINGS = (
    Setting(
        name="HIP_FORCE_DEV_KERNARG",
        value="1",
        why="arguments of kernels lie in the device's memory, so launches take less time",
    ),
    Setting(
        name="TORCH_BLAS_PREFER_HIPBLASLT",
        value="1",
        why="large products go to hipBLASLt, which is tuned for them",
    ),
)
"""All of them."""


def report(environment: Mapping[str, str]) -> list[ReportItem]:
    """Lines for ``doctor``, one a variable."""
    return [_line(setting, environment.get(setting.name)) for setting in SETTINGS]


def decisions(environment: Mapping[str, str]) -> list[Decision]:
    """Records for ``explain``, one a variable."""
    return [_decision(setting, environment.get(setting.name)) for setting in SETTINGS]


def has_expandable_segments(environment: Mapping[str, str]) -> bool:
    """Whether torch's allocator was told to grow its segments in place."""
    texts = (environment.get(name, "").replace(" ", "").lower() for name in _ALLOCATOR)
    return any("expandable_segments:true" in text for text in texts)


def _line(setting: Setting, found: str | None) -> ReportItem:
    if found is not None:
        return ReportItem(name=setting.name, value=found)
    remedy = f"Set {setting.name}={setting.value} before the start: {setting.why}."
    return ReportItem(name=setting.name, value="not set", status="warn", remedy=remedy)


def _decision(setting: Setting, found: str | None) -> Decision:
    proposed = Candidate(name=setting.value, verdict="possible", reason=setting.why)
    there = Candidate(name="not set", verdict="chosen", reason="the environment is the user's")
    if found is not None:
        there = Candidate(name=found, verdict="chosen", reason="set in the environment")
    same = found == setting.value
    return Decision(
        point=f"environment.{setting.name}",
        chosen=there.name,
        candidates=(there,) if same else (there, proposed),
    )
