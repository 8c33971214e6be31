# SPDX-License-Identifier: Apache-2.0
"""The real operator schemas in plain torch: wrong keywords and types fail as they would."""

from __future__ import annotations

__all__ = ["PATH", "define", "read"]

import json
from pathlib import Path

import torch

PATH = Path(__file__).with_name("schemas.json")


def read(path=PATH):
    """Operator name with overload → its schema."""
    texts = json.loads(path.read_text(encoding="utf-8"))["schemas"]
    return {text.partition("(")[0].removeprefix("npu::"): text for text in texts}


def define(path=PATH, changes=None):
    """Define the operators in the namespace ``npu``, as long as the result is kept.

    Args:
        path: Where the schemas are.
        changes: Operator → another schema; for tests that such a change is noticed.
    """
    library = torch.library.Library("npu", "FRAGMENT")
    for name, text in (read(path) | (changes or {})).items():
        library.define(text.removeprefix("npu::"))
        del name
    return library
