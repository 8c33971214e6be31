# SPDX-License-Identifier: Apache-2.0
"""A recording that breaks off is over for torch's allocator, too."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from bedplate_triton.recording import recording


class Allocator:
    """Hears that a capture is over; says so if it knew."""

    def __init__(self, *, knows):
        self.knows, self.told = knows, 0

    def end(self):
        self.told += 1
        if self.knows:
            raise RuntimeError("not recording to this pool")


@contextmanager
def broken():
    yield
    raise RuntimeError("the capture was invalidated")


@contextmanager
def whole():
    yield


def test_a_whole_recording_needs_nothing():
    allocator = Allocator(knows=True)
    with recording(whole(), allocator.end):
        pass
    assert not allocator.told


def test_the_allocator_hears_of_one_that_breaks():
    allocator = Allocator(knows=False)
    with pytest.raises(RuntimeError, match="invalidated"), recording(broken(), allocator.end):
        pass
    assert allocator.told == 1


def test_a_pass_that_fails_is_told_as_it_failed():
    allocator = Allocator(knows=True)
    with pytest.raises(ValueError, match="in the pass"), recording(whole(), allocator.end):
        raise ValueError("in the pass")
    assert allocator.told == 1
