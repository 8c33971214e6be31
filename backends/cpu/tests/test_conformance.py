# SPDX-License-Identifier: Apache-2.0
"""The conformance kit, as a vendor has it: one line, and what to examine.

Levels 5 to 7 compile graphs, run whole models and take times: ``bedplate conformance`` does.
"""

from __future__ import annotations

from bedplate.conformance.suite import *  # noqa: F403

BACKEND = "cpu"
LEVEL = "0-4,8"
