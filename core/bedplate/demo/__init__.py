# SPDX-License-Identifier: Apache-2.0
"""The folder of the bundled demo model, a checkpoint like any other.

Apart from ``models`` because it is data: weights, tokenizer and card, made by
``scripts/demo_model``. The command line loads it when no model is named.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """The folder that holds ``config.json``, ``model.safetensors`` and the tokenizer."""
    return Path(str(files(__name__)))
