# SPDX-License-Identifier: Apache-2.0
"""What is asked of the driver when a device is taken, of a driver that is made up."""

from __future__ import annotations

import pytest

from bedplate_cuda import runtime


class Driver:
    """Knows one limit."""

    def __init__(self, stack, failure=0):
        self.stack, self.failure = stack, failure

    def cuCtxGetLimit(self, size, which):
        assert which == 0
        size._obj.value = self.stack
        return self.failure

    def cuCtxSetLimit(self, which, size):
        assert which == 0
        self.stack = size.value
        return 0


@pytest.mark.parametrize(
    ("driver", "stack"),
    [(Driver(1024), 256), (Driver(4096), 4096), (Driver(64), 64), (Driver(1024, 801), 1024)],
    ids=["usual", "larger", "smaller", "unknown"],
)
def test_only_the_usual_stacks_are_made_smaller(driver, stack, monkeypatch):
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda _name: driver)
    runtime._spare_stacks()
    assert driver.stack == stack


def test_without_the_driver_s_library_nothing_happens(monkeypatch):
    def missing(_name):
        raise OSError

    monkeypatch.setattr(runtime.ctypes, "CDLL", missing)
    runtime._spare_stacks()
