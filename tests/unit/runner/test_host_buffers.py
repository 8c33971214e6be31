# SPDX-License-Identifier: Apache-2.0
"""Host buffers are written again only when the copies made from them have been done."""

from __future__ import annotations

from bedplate.reference.runtime import TorchRuntime
from bedplate.runner.host_buffers import HostBuffers


class Slow(TorchRuntime):
    """Its events are reached when the host waits for them."""

    def __init__(self):
        super().__init__("cpu")
        self.waited = []

    def record_event(self):
        runtime, number = self, len(self.waited)
        self.waited.append(False)

        class Mark:
            def synchronize(self):
                runtime.waited[number] = True

        return Mark()


def test_only_the_copy_before_the_last_is_waited_for():
    runtime = Slow()
    buffers = HostBuffers(runtime, 64)
    for step in range(5):
        buffers.take(8)
        assert runtime.waited == [step_before < step - 1 for step_before in range(step)]
        buffers.sent()


def test_two_in_turn():
    buffers = HostBuffers(TorchRuntime("cpu"), 64)
    places = []
    for _ in range(4):
        places.append((buffers.turn, buffers.take(8).data_ptr()))
        buffers.sent()
    assert places[0][1] == places[2][1] != places[1][1] == places[3][1]


def test_a_buffer_grows_by_itself():
    buffers = HostBuffers(TorchRuntime("cpu"), 16)
    assert len(buffers.take(100)) == 100
    buffers.sent()
    other = buffers.take(8)
    assert len(other) == 8
    buffers.sent()
    assert len(buffers.take(200)) == 200  # room for twice what was asked for
