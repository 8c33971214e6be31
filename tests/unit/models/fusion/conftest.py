# SPDX-License-Identifier: Apache-2.0
"""An operation registry with the references, and optionally a kernel of a backend."""

from __future__ import annotations

import pytest

from bedplate.contract import OpProvider
from bedplate.reference.ops import OPERATIONS, linear
from bedplate.registry.decisions import DecisionLog
from bedplate.registry.ops import Operations


@pytest.fixture
def ops():
    """``ops(rms_norm=callable)`` → registry in which a backend brings these operations.

    It brings ``linear`` too, unless ``linear=None``.
    """

    def make(**calls):
        calls = {op: call for op, call in ({"linear": linear} | calls).items() if call}
        registry = Operations(OPERATIONS, DecisionLog(), "test")
        for op, call in calls.items():
            registry.register(OpProvider(op=op, provider="kernels", call=call))
        return registry

    return make
