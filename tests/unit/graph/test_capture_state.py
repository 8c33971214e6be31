# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import threading

import pytest

from bedplate.graph.capture_state import freeze_gc, get_is_capture_mode, model_capture_mode


def test_flag_is_set_only_inside():
    assert not get_is_capture_mode()
    with model_capture_mode():
        assert get_is_capture_mode()
    assert not get_is_capture_mode()


def test_flag_falls_when_the_block_raises():
    with pytest.raises(RuntimeError, match="boom"), model_capture_mode():
        raise RuntimeError("boom")
    assert not get_is_capture_mode()


def test_inner_block_does_not_lower_the_outer_flag():
    with model_capture_mode():
        with pytest.raises(RuntimeError), model_capture_mode():
            raise RuntimeError("boom")
        assert get_is_capture_mode()


def test_other_threads_do_not_see_the_flag():
    seen: list[bool] = []
    with model_capture_mode():
        thread = threading.Thread(target=lambda: seen.append(get_is_capture_mode()))
        thread.start()
        thread.join()
    assert seen == [False]


def test_gc_is_frozen_inside_and_thawed_after_an_error():
    counts = []

    def fail():
        counts.append(gc.get_freeze_count())
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError), freeze_gc(enable_gc=False):
        fail()
    assert counts[0] > 0
    assert gc.get_freeze_count() == 0


def test_gc_is_left_alone_when_enabled():
    with freeze_gc(enable_gc=True):
        assert gc.get_freeze_count() == 0


def test_what_the_application_froze_is_frozen_again():
    gc.freeze()
    with freeze_gc():
        pass
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


def test_inner_freeze_does_not_thaw_the_outer():
    with freeze_gc():
        with freeze_gc():
            pass
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


class _Cycle:
    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.me = self

    def __del__(self) -> None:
        self.log.append("collected")


@pytest.fixture
def automatic_gc_off():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("automatic_gc_off")
def test_garbage_is_collected_before_freezing_and_after_thawing():
    log: list[str] = []
    _Cycle(log)
    with freeze_gc():
        assert log == ["collected"]
        _Cycle(log)
        assert log == ["collected"]
    assert log == ["collected", "collected"]
