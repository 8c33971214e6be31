# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc

import pytest

from bedplate.contract import ActivateRequest

SCHEDULES = ("eager", "lazy", "random", "threaded")


@pytest.fixture(autouse=True)
def no_collections(monkeypatch):
    """Full collections around captures would be most of the time of these tests."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


@pytest.fixture
def take():
    """Take simulated devices by their options; they are given back at the end."""
    from bedplate_sim.runtime import SimRuntime

    taken = []

    def take(index=0, **options):
        taken.append(SimRuntime(ActivateRequest(device_index=index, options=options)))
        return taken[-1]

    yield take
    for runtime in taken:
        runtime.shutdown()


@pytest.fixture(params=SCHEDULES)
def runtime(request, take):
    """A device under each schedule."""
    return take(schedule=request.param, seed=7)


@pytest.fixture
def lazy(take):
    """A device that runs nothing before it is waited for."""
    return take(schedule="lazy")
