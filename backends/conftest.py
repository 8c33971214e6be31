# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels run in its interpreter where there is no accelerator.

The interpreter must be chosen before anything imports triton, as torch's compiler does when
tests of another backend are collected; hence here and not beside the tests that use it.
"""

from __future__ import annotations

import os

import torch

if not torch.accelerator.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
