# SPDX-License-Identifier: Apache-2.0
"""The device of the suite; what lies here needs that of layer B, by name."""

from backends.npu.tests.suite.conftest import runtime

__all__ = ["runtime"]
