# SPDX-License-Identifier: Apache-2.0
"""No time of a simulated device is ever reported."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from benchmarks.cases import engine, startup
from benchmarks.device import refuse_simulated

from bedplate_npu.runtime import capabilities

pytestmark = pytest.mark.npu_silicon


@pytest.mark.parametrize("benchmark", [engine, startup])
def test_nothing_is_begun(monkeypatch, benchmark):
    (shape, *_) = startup.SHAPES
    monkeypatch.setattr(sys, "argv", ["benchmark", shape, "--backend", "npu"])
    with pytest.raises(SystemExit, match="ASCEND_SIMULATED_RUNTIME=Python device is set"):
        benchmark.main()


def test_an_engine_on_it_is_refused(runtime):
    bound = SimpleNamespace(name="npu", capabilities=capabilities(runtime))
    with pytest.raises(SystemExit, match="'npu' simulates its device"):
        refuse_simulated(SimpleNamespace(runner=SimpleNamespace(bound=bound)))
