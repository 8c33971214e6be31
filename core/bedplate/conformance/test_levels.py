# SPDX-License-Identifier: Apache-2.0
"""What ``--pyargs bedplate.conformance`` collects: what vendors get by a star import."""

from __future__ import annotations

from bedplate.conformance.suite import (  # noqa: F401 - pytest looks for them here
    conformance_session,
    pytest_generate_tests,
    test_conformance,
)
