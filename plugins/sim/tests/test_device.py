# SPDX-License-Identifier: Apache-2.0
"""Streams, events, pinned memory: what is ordered is right, what is not is found."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bedplate.contract import ActivateRequest
from bedplate.errors import BackendUnavailableError
from bedplate_sim.device import DeviceLostError
from bedplate_sim.races import RaceError
from bedplate_sim.runtime import SimRuntime

STREAMS, TENSORS = 3, 3
programs = st.lists(
    st.tuples(
        st.integers(0, STREAMS - 1), st.integers(0, TENSORS - 1), st.integers(0, TENSORS - 1)
    ),
    max_size=12,
)


def run(program, schedule, seed, *, ordered):
    """Work that adds one tensor to another, on streams that wait for each other or not."""
    runtime = SimRuntime(ActivateRequest(options={"schedule": schedule, "seed": seed}))
    try:
        device = runtime.simulated
        streams = [device.home, *(device.new_stream() for _ in range(STREAMS - 1))]
        tensors = [torch.full((4,), i + 1, device=runtime.device) for i in range(TENSORS)]
        last = runtime.record_event()
        for stream, target, source in program:
            if ordered:
                streams[stream].wait(last)
            with device.stream(streams[stream]):
                tensors[target].mul_(2).add_(tensors[source])
                last = device.record_event()
        runtime.synchronize()
        return [tensor.tolist() for tensor in tensors]
    finally:
        runtime.shutdown()


def expected(program):
    values = [i + 1 for i in range(TENSORS)]
    for _, target, source in program:
        doubled = values[target] * 2
        values[target] = doubled + (doubled if source == target else values[source])
    return [[value] * 4 for value in values]


@given(program=programs, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("schedule", ["eager", "lazy", "random", "threaded"])
def test_ordered_work_gives_the_same_under_every_schedule(schedule, program, seed):
    assert run(program, schedule, seed, ordered=True) == expected(program)


@given(program=programs, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
def test_work_is_either_ordered_or_refused(schedule, program, seed):
    """Without waits: refused, or so independent that no order could change the result."""
    try:
        result = run(program, schedule, seed, ordered=False)
    except RaceError:
        assert {stream for stream, *_ in program} != {0}
    else:
        assert result == expected(program)


def test_a_missing_wait_between_streams_names_both(runtime):
    device, side = runtime.simulated, runtime.simulated.new_stream()
    x = torch.zeros(4, device=runtime.device)
    x.exp_()
    with device.stream(side), pytest.raises(RaceError, match=r"aten\.add.*aten\.exp_"):
        x + 1
    side.wait(runtime.record_event())
    with device.stream(side):
        y = x + 1
        done = runtime.record_event()
    done.synchronize()
    assert y.tolist() == [2.0] * 4


def test_memory_that_another_stream_still_reads_is_not_overwritten(runtime):
    device, side = runtime.simulated, runtime.simulated.new_stream()
    x = torch.zeros(4, device=runtime.device)
    side.wait(runtime.record_event())
    with device.stream(side):
        kept = x + 1
    address = x.data_ptr()
    del x
    with pytest.raises(RaceError, match=r"overwrites.*stream 1\) still reads"):
        torch.empty(4, device=runtime.device)
    runtime.synchronize()
    assert torch.empty(4, device=runtime.device).data_ptr() == address
    assert kept.tolist() == [1.0] * 4


def test_the_host_waits_for_one_event_only(lazy):
    x = torch.zeros(2, device=lazy.device)
    event = lazy.record_event()
    x.add_(1)
    event.synchronize()
    device = lazy.simulated
    assert 0 < device.home.done < device.home.launched
    assert event.query()


def test_asking_again_and_again_comes_to_an_end(runtime):
    x = torch.zeros(2, device=runtime.device).add_(1).mul_(3)
    event = runtime.record_event()
    begin = time.monotonic()
    while not event.query():
        assert time.monotonic() < begin + 10
    assert torch.equal(x.backing, torch.full((2,), 3.0))


def test_an_event_can_be_slow(take):
    runtime = take(schedule="eager", event_delay_ms=30)
    begin = time.monotonic()
    event = runtime.record_event()
    assert not event.query()
    event.synchronize()
    assert time.monotonic() >= begin + 0.03
    assert event.query()


def test_tokens_read_from_pinned_memory_before_the_event(runtime):
    """What an engine does at the end of each step, without its wait."""
    tokens = torch.arange(3, device=runtime.device)
    host = runtime.empty_host(24).view(torch.int64)
    host.copy_(tokens, non_blocking=True)
    event = runtime.record_event()
    with pytest.raises(RaceError, match=r"Tensor\.numpy of pinned memory.*aten\.copy_"):
        host.numpy()
    with pytest.raises(RaceError, match=r"Tensor\.tolist"):
        host.tolist()
    event.synchronize()
    assert host.numpy().tolist() == [0, 1, 2]


def test_a_view_that_numpy_has_already_sees_poison_before_the_event(lazy):
    host = lazy.empty_host(24).view(torch.int64)
    seen = host.numpy()
    host.copy_(torch.arange(3, device=lazy.device), non_blocking=True)
    assert (seen > 2**62).all()
    lazy.synchronize()
    assert seen.tolist() == [0, 1, 2]


def test_a_staging_buffer_is_not_written_before_its_copy_was_made(runtime):
    host = runtime.empty_host(16).view(torch.int32)
    host.numpy()[:] = [1, 2, 3, 4]
    x = torch.empty(4, dtype=torch.int32, device=runtime.device)
    x.copy_(host, non_blocking=True)
    event = runtime.record_event()
    with pytest.raises(RaceError, match=r"overwrites memory.*aten\.copy_"):
        host.numpy()
    with pytest.raises(RaceError, match=r"Tensor\.fill_"):
        host[:2].fill_(0)
    event.synchronize()
    host.numpy()[:] = 0
    assert x.tolist() == [1, 2, 3, 4]


def test_pageable_memory_is_taken_as_it_is(lazy):
    """As drivers do: a copy that does not block has left pageable memory when it returns."""
    array = torch.arange(4)
    x = array.to(lazy.device, non_blocking=True)
    array.zero_()
    assert x.tolist() == [0, 1, 2, 3]


def test_pinned_memory_is_aligned_and_poisoned(runtime):
    host = runtime.empty_host(100)
    assert host.shape == (100,)
    assert host.dtype == torch.uint8
    assert host.is_pinned()
    assert host[1:].is_pinned()
    assert not (host[:0] + 1).is_pinned()
    assert host.data_ptr() % 64 == 0
    assert (host[:96].view(torch.int64).numpy() > 2**62).all()


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random", "threaded"])
def test_work_that_fails_loses_the_device_and_says_which(take, schedule):
    runtime = take(schedule=schedule)
    x = torch.zeros(4, device=runtime.device)
    nine = torch.tensor([9], device=runtime.device)
    with pytest.raises(DeviceLostError, match=r"aten\.index.*stream 0"):
        x[nine].tolist()
    with pytest.raises(DeviceLostError):
        x + 1
    with pytest.raises(DeviceLostError):
        runtime.synchronize()


def test_a_device_is_lost_at_the_chosen_piece_of_work(take):
    runtime = take(schedule="lazy", fail_launch=3)
    x = torch.empty(4, device=runtime.device)
    x.zero_()
    with pytest.raises(DeviceLostError, match="told to fail"):
        x.add_(1)


def test_engines_that_ask_for_the_same_share_a_device(take):
    first, second = take(seed=1, host_reads="refuse"), take(seed=1, host_reads="refuse")
    assert first.simulated is second.simulated
    x = torch.ones(2, device=first.device)
    first.ready()
    assert x.tolist() == [1.0, 1.0], "the start-up of the other one still reads"
    second.ready()
    with pytest.raises(RaceError):
        x.tolist()
    for _ in range(2):
        second.shutdown()
    x.add_(1)
    first.synchronize()
    assert x.backing.tolist() == [2.0, 2.0]


def test_engines_that_ask_for_other_devices_get_others(take):
    take()
    with pytest.raises(BackendUnavailableError, match="sim:1") as caught:
        take(seed=1)
    assert caught.value.code == "HW010"
    other = take(1, seed=1)
    assert torch.zeros(1, device=other.device).device.index == 1


def test_a_device_that_was_given_back_can_be_taken_again(take):
    take().shutdown()
    assert torch.zeros(2, device=take().device).tolist() == [0.0, 0.0]
