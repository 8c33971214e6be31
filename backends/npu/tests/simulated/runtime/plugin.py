# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that puts the simulated runtime below torch_npu, before it is imported."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path

from backends.npu.tests.simulated.runtime import build, operators

_wheel = Path(importlib.util.find_spec("torch_npu").origin).parent
operators.install(os.environ["SIM_LIBRARY"], build.operators(_wheel / "lib/libtorch_npu.so"))
ctypes.CDLL(os.environ["SIM_LIBRARY"])


def pytest_configure(config):
    """Layers below torch_npu are old acquaintances of warnings; ours stay errors elsewhere."""
    config.addinivalue_line("filterwarnings", "ignore::UserWarning")
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning")
