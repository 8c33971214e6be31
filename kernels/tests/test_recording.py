# SPDX-License-Identifier: Apache-2.0
"""A recording that breaks off is over for torch's allocator, too."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from bedplate_triton.recording import recording


@pytest.fixture
def log(monkeypatch):
    """What is asked of ``torch.cuda``; a capture that is told to break ends with an error."""
    calls = []

    @contextmanager
    def record(graph, *, pool, stream, capture_error_mode):
        calls.append((graph, pool, stream, capture_error_mode))
        try:
            yield
        finally:
            if graph == "breaks":
                raise RuntimeError("the capture was invalidated")

    def end(device, pool):
        calls.append(("over", device, pool))
        if graph_of(calls) == "whole":
            raise RuntimeError("not recording to this pool")

    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
    return calls


def graph_of(calls):
    return calls[0][0]


def test_a_whole_recording_needs_nothing(log):
    with recording("whole", "pool", "side"):
        pass
    assert log == [("whole", "pool", "side", "thread_local")]


def test_the_allocator_hears_of_one_that_breaks(log):
    with pytest.raises(RuntimeError, match="invalidated"), recording("breaks", "pool", "side"):
        pass
    assert log[1:] == [("over", 3, "pool")]


def test_a_pass_that_fails_is_told_as_it_failed(log):
    """Its capture ended as it should, and the allocator says that it knows."""
    with pytest.raises(ValueError, match="in the pass"), recording("whole", "pool", "side"):
        raise ValueError("in the pass")
    assert log[1:] == [("over", 3, "pool")]
