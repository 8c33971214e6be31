# SPDX-License-Identifier: Apache-2.0
"""The device of the suite."""

from __future__ import annotations

from backends.npu.tests.suite.conftest import runtime  # noqa: F401
