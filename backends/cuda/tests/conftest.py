# SPDX-License-Identifier: Apache-2.0
"""Kernels run in Triton's interpreter where there is no accelerator, and not without Triton.

The interpreter must be chosen before triton is imported, hence here.
"""

from __future__ import annotations

import importlib.util
import os

import torch

if not torch.accelerator.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

collect_ignore = [] if importlib.util.find_spec("triton") else ["test_attention.py"]
