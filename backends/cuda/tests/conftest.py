# SPDX-License-Identifier: Apache-2.0
"""Attention is not tested where Triton is not installed."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") else ["test_attention.py"]
