# SPDX-License-Identifier: Apache-2.0
"""What ``--pyargs bedplate.conformance`` collects."""

from __future__ import annotations

from bedplate.conformance.suite import *  # noqa: F403 - the one line that vendors write, too
