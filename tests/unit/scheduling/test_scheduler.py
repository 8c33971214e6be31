# SPDX-License-Identifier: Apache-2.0
"""What the scheduler plans, pass by pass, and what it does when room is short."""

from __future__ import annotations

import numpy as np
import pytest

from bedplate.batch.forward_mode import ForwardMode
from bedplate.batch.step import StepOutput
from bedplate.errors import ConfigError, RequestTooLongError
from bedplate.memory.allocator import PagedAllocator
from bedplate.memory.req_to_token import ReqToTokenPool
from bedplate.runner.sampling_params import SamplingParams
from bedplate.scheduling.request import Request, RequestState
from bedplate.scheduling.scheduler import Scheduler

EOS = 9


def make(*, tokens=64, page=4, rows=4, context=64, budget=16, **options):
    scheduler = Scheduler(
        allocator=PagedAllocator(tokens, page),
        req_to_token_pool=ReqToTokenPool(rows, context),
        page_size=page,
        max_context_len=context,
        max_running_requests=rows,
        max_prefill_tokens=budget,
        **options,
    )
    scheduler.numbers = iter(range(1, 100))
    return scheduler


def add(scheduler, prompt, *, priority=0, **params):
    prompt = list(range(10, 10 + prompt)) if isinstance(prompt, int) else prompt
    settings = SamplingParams(**{"max_tokens": 8, **params})
    number = next(scheduler.numbers)
    request = Request(
        request_id=str(number),
        number=number,
        tokens=np.array(prompt, np.int32),
        prompt_len=len(prompt),
        params=settings,
        priority=priority,
        max_len=scheduler.limit_of(len(prompt), settings.max_tokens),
        min_len=len(prompt) + max(1, settings.min_tokens),
        stop_ids=(EOS,),
        arrived_s=0.0,
    )
    scheduler.add(request)
    return request


def answer(batch, token=7, **more):
    tokens = np.full(batch.batch_size, token, np.int64)
    if batch.sample is not None:
        tokens[~batch.sample] = -1
    return StepOutput(next_token_ids=tokens, **more)


def run(scheduler, token=7):
    """Plan and settle one pass; returns what was planned, copied."""
    batch = scheduler.next_batch()
    if batch is None:
        return None
    planned = {
        "mode": batch.mode.name,
        "lens": batch.seq_lens.tolist(),
        "new": None if batch.extend_seq_lens is None else batch.extend_seq_lens.tolist(),
        "ids": batch.input_ids.tolist(),
        "sample": None if batch.sample is None else batch.sample.tolist(),
    }
    applied = scheduler.apply(answer(batch, token))
    return planned | {"finished": [r.finish_reason for r in applied.finished]}


def finish_all(scheduler, limit=200):
    steps = []
    while scheduler.has_requests:
        steps.append(run(scheduler))
        assert len(steps) < limit
    return steps


# Limits.


@pytest.mark.parametrize(
    ("prompt", "most", "tokens", "limit"),
    [
        (10, 8, 64, 18),
        (10, None, 64, 64),  # until the context is full
        (10, None, 32, 33),  # until the pool is full; the last token needs no slot
        (63, 1, 64, 64),
        (32, 1, 32, 33),
    ],
)
def test_where_a_request_must_end(prompt, most, tokens, limit):
    assert make(tokens=tokens).limit_of(prompt, most) == limit


@pytest.mark.parametrize(
    ("prompt", "most", "tokens"), [(60, 5, 64), (64, None, 64), (30, 4, 32), (33, 1, 32)]
)
def test_what_can_never_fit_is_refused_with_the_numbers(prompt, most, tokens):
    with pytest.raises(RequestTooLongError, match=str(prompt)) as caught:
        make(tokens=tokens).limit_of(prompt, most)
    assert caught.value.facts == {
        "prompt_len": prompt,
        "max_tokens": most,
        "max_context_len": 64,
        "pool_tokens": tokens,
    }


def test_the_budget_holds_at_least_a_page():
    with pytest.raises(ConfigError, match="max_prefill_tokens is 3"):
        make(budget=3)


def test_the_largest_request_that_is_accepted_really_runs():
    scheduler = make(tokens=32, budget=8)
    request = add(scheduler, 25, max_tokens=8)
    finish_all(scheduler)
    assert len(request.output) == 8


# Passes.


def test_a_long_prompt_is_cut_at_pages():
    scheduler = make(budget=10)
    add(scheduler, 21, max_tokens=2)
    steps = finish_all(scheduler)
    assert [step["new"] for step in steps] == [[8], [8], [5], None]
    assert [step["sample"] for step in steps] == [[False], [False], None, None]
    assert [step["lens"] for step in steps] == [[8], [16], [21], [22]]
    assert steps[2]["ids"] == [26, 27, 28, 29, 30]
    assert steps[3]["finished"] == ["length"]


def test_prompts_share_a_pass_and_extend_goes_before_decode():
    scheduler = make(prefix_cache=False)
    add(scheduler, 5)
    run(scheduler)
    add(scheduler, 6)
    add(scheduler, 7)
    assert run(scheduler)["new"] == [6, 7]
    step = run(scheduler)
    assert step["mode"] == "DECODE"
    assert step["lens"] == [6, 7, 8]
    assert step["ids"] == [7, 7, 7]


def test_the_longest_of_many_stand_first_and_each_keeps_its_own():
    """Also while they join and leave; they are sorted afresh when an eighth has moved."""
    rng = np.random.default_rng(3)
    scheduler = make(tokens=8192, rows=96, context=160, budget=64)
    scheduler.numbers = iter(range(1, 1000))
    requests = [
        add(scheduler, rng.integers(10, 99, size=size).tolist(), max_tokens=int(most))
        for size, most in rng.integers(1, 60, size=(190, 2))
    ]
    disorder = []
    while scheduler.has_requests:
        batch = scheduler.next_batch()
        if batch.mode is ForwardMode.DECODE:
            table, rows = scheduler.roster.table, batch.req_pool_indices
            lens, last = table.known_len[rows], table.known_len[rows] - 1
            assert batch.seq_lens.tolist() == lens.tolist()
            assert batch.positions.tolist() == last.tolist()
            assert batch.input_ids.tolist() == table.tokens[rows, last].tolist()
            assert batch.out_cache_loc.tolist() == table.slots[rows * 160 + last].tolist()
            if len(lens) >= 64:
                steps = np.diff(batch.seq_lens) > 0
                disorder.append(steps.sum() / len(lens))
        tokens = rng.integers(100, 200, size=batch.batch_size)
        if batch.sample is not None:
            tokens[~batch.sample] = -1
        scheduler.apply(StepOutput(next_token_ids=tokens))
    assert len(disorder) > 10
    assert max(disorder) <= 1 / 8 + 1 / 64
    assert all(len(request.output) == request.params.max_tokens for request in requests)


def test_nothing_to_do_is_no_pass():
    scheduler = make()
    assert scheduler.next_batch() is None
    assert not scheduler.has_requests


def test_decode_rows_ride_along_when_mixed():
    scheduler = make(mixed=True, budget=8, prefix_cache=False)
    add(scheduler, 5)
    run(scheduler)
    add(scheduler, 9)
    step = run(scheduler)
    assert step["mode"] == "MIXED"
    assert step["new"] == [4, 1]  # one rider leaves room for one page
    assert step["lens"] == [4, 6]
    assert step["sample"] == [False, True]
    finish_all(scheduler)


def test_riders_that_leave_no_page_stay_behind():
    scheduler = make(mixed=True, budget=4, prefix_cache=False)
    add(scheduler, 3)
    run(scheduler)
    add(scheduler, 4)
    assert run(scheduler)["mode"] == "EXTEND"


def test_riders_stay_behind_when_slots_are_short():
    scheduler = make(mixed=True, tokens=16, budget=16, prefix_cache=False)
    add(scheduler, 4, max_tokens=8)
    run(scheduler)  # its next token needs a page
    # The waiting one leaves one page for the rider, a third prompt takes that.
    add(scheduler, 4, max_tokens=2)
    add(scheduler, 4, max_tokens=2)
    modes = [step["mode"] for step in finish_all(scheduler)]
    assert modes[0] == "MIXED"


def test_a_rider_that_gave_way_does_not_ride():
    scheduler = make(mixed=True, rows=1)
    add(scheduler, 4)
    run(scheduler)
    run(scheduler)
    add(scheduler, 4, priority=1)
    assert run(scheduler)["mode"] == "EXTEND"
    finish_all(scheduler)


def test_urgent_requests_go_first():
    scheduler = make(rows=1)
    low, high = add(scheduler, 4), add(scheduler, 4, priority=1)
    run(scheduler)
    assert (low.state, high.state) == (RequestState.WAITING, RequestState.JOINING)


# Ends.


def test_an_end_token_ends_unless_it_is_too_early():
    scheduler = make()
    request = add(scheduler, 4, min_tokens=3)
    for _ in range(3):
        step = run(scheduler, token=EOS)
    assert step["finished"] == ["stop"]
    assert request.stop_reason == EOS
    assert request.output.tolist() == [EOS] * 3


def test_stop_tokens_win_over_the_length():
    scheduler = make()
    add(scheduler, 4, max_tokens=1)
    assert run(scheduler, token=EOS)["finished"] == ["stop"]


def test_requests_with_many_stop_tokens_join_others():
    scheduler = make()
    add(scheduler, 4)
    run(scheduler)
    other = add(scheduler, 4)
    other.stop_ids = (31, 32, 33)
    run(scheduler)
    run(scheduler)
    assert run(scheduler, token=33)["finished"] == ["stop"]
    assert other.finished
    assert run(scheduler, token=33)["finished"] == []


def test_a_waiting_request_can_be_ended():
    scheduler = make(rows=1)
    add(scheduler, 4)
    run(scheduler)
    waits = add(scheduler, 4)
    behind = add(scheduler, 4)
    scheduler.finish(waits, "abort")
    scheduler.finish(waits, "error", error="late")
    assert waits.finish_reason == "abort"
    assert scheduler.num_waiting == 1
    finish_all(scheduler)
    assert behind.finish_reason == "length"


def test_errors_end_their_request_only_and_leave_no_trace_in_the_cache():
    scheduler = make(budget=32)
    bad, good = add(scheduler, 8), add(scheduler, 9)
    batch = scheduler.next_batch()
    applied = scheduler.apply(answer(batch, errors={0: "not a number"}))
    assert applied.finished == [bad]
    assert (bad.error, len(bad.output)) == ("not a number", 0)
    assert scheduler.slots.cache.total_size == 8  # the good one's pages
    finish_all(scheduler)
    assert good.finish_reason == "length"


# Prefix cache.


def test_a_second_request_computes_what_the_first_did_not():
    scheduler = make()
    add(scheduler, 10)
    finish_all(scheduler)
    second = add(scheduler, 14)
    batch = scheduler.next_batch()
    assert second.cached_tokens == 8
    assert batch.extend_prefix_lens.tolist() == [8]
    update = batch.table_update
    assert update.rows.tolist() == batch.req_pool_indices.tolist() * 8
    assert update.columns.tolist() == list(range(8))
    assert sorted(update.slots // 4) == sorted(list(dict.fromkeys(update.slots // 4)) * 4)


def test_one_token_is_always_computed():
    scheduler = make()
    add(scheduler, 8)
    finish_all(scheduler)
    second = add(scheduler, 8)
    assert run(scheduler)["new"] == [4]
    assert second.cached_tokens == 4


def test_a_running_request_shares_its_prompt():
    scheduler = make()
    add(scheduler, 9)
    run(scheduler)
    add(scheduler, 9)
    assert run(scheduler)["new"] == [1]


def test_equal_prompts_in_one_pass_keep_one_copy():
    scheduler = make()
    add(scheduler, 8)
    add(scheduler, 8)
    finish_all(scheduler)
    cache = scheduler.slots.cache
    assert cache.total_size == 12  # 8 + 7 computed of 8 new ones, whole pages, once
    assert cache.evictable_size == 12
    assert scheduler.free_tokens == 64


# Short of room.


def test_the_last_in_rank_gives_way_and_comes_back():
    scheduler = make(tokens=40, rows=3, prefix_cache=False)
    requests = [add(scheduler, 7, max_tokens=9) for _ in range(2)]
    requests.append(add(scheduler, 5, max_tokens=9, priority=1))
    finish_all(scheduler)
    assert [r.preemptions > 0 for r in requests] == [False, True, False]
    assert [r.output.tolist() for r in requests] == [[7] * 9] * 3
    assert scheduler.free_tokens == 40


def test_the_more_urgent_takes_the_place_of_the_less():
    scheduler = make(rows=1)
    low = add(scheduler, 6)
    run(scheduler)
    run(scheduler)
    high = add(scheduler, 6, priority=3)
    same = add(scheduler, 6, priority=3)
    assert run(scheduler)["mode"] == "EXTEND"
    assert low.state is RequestState.WAITING
    assert (low.preemptions, low.tokens.tolist()[6:]) == (1, [7, 7])
    finish_all(scheduler)
    assert high.finished_s <= same.finished_s <= low.finished_s
    assert len(low.output) == 8


def test_nobody_gives_way_while_a_pass_is_in_flight():
    scheduler = make(rows=1, overlap=True)
    low = add(scheduler, 6)
    flying = scheduler.next_batch()
    scheduler.apply(answer(flying))
    flying = scheduler.next_batch()
    add(scheduler, 6, priority=3)
    assert scheduler.next_batch() is None
    assert low.state is RequestState.DECODING
    scheduler.apply(answer(flying))
    assert scheduler.next_batch().mode is ForwardMode.EXTEND
    assert low.state is RequestState.WAITING


def test_an_unfinished_prompt_gives_way_too():
    scheduler = make(tokens=32, budget=8, prefix_cache=False)
    first = add(scheduler, 20)
    run(scheduler)
    second = add(scheduler, 28, max_tokens=2, priority=1)
    run(scheduler)
    assert (first.state, second.state) == (RequestState.WAITING, RequestState.EXTENDING)
    finish_all(scheduler)
    assert [len(r.output) for r in (first, second)] == [8, 2]


def test_a_more_urgent_prompt_overtakes_an_unfinished_one():
    scheduler = make(budget=8, prefix_cache=False)
    first = add(scheduler, 20)
    run(scheduler)
    second = add(scheduler, 9, priority=1)
    assert run(scheduler)["lens"] == [8]
    assert run(scheduler)["lens"] == [9, 12]
    assert (first.preemptions, second.state) == (0, RequestState.JOINING)


def test_those_who_decode_keep_room_for_a_page_each():
    scheduler = make(tokens=16, prefix_cache=False)
    first = add(scheduler, 4)
    run(scheduler)  # its next token needs a page
    second = add(scheduler, 12, max_tokens=1)
    finish_all(scheduler)
    assert first.finished_s < second.admitted_s
    assert (first.preemptions, second.preemptions) == (0, 0)


def test_nobody_takes_what_the_more_urgent_could_not_get():
    scheduler = make(budget=8, prefix_cache=False)
    low = add(scheduler, 12)
    run(scheduler)
    high = add(scheduler, 20, priority=1)
    run(scheduler)
    elsewhere = scheduler.slots._allocator.alloc(64 - 16 - 4)
    assert scheduler.next_batch() is None  # one page is left: too little for the urgent one
    scheduler.slots._allocator.free(elsewhere)
    assert run(scheduler)["lens"] == [16]
    assert (high.preemptions, low.preemptions) == (0, 0)


# Overlap.


def test_the_next_pass_is_planned_before_the_tokens_are_known():
    scheduler = make(overlap=True)
    request = add(scheduler, 4, max_tokens=3)
    passes = [scheduler.next_batch()]
    lens = [passes[0].seq_lens.tolist()]
    while True:
        batch = scheduler.next_batch()
        if batch is not None:
            assert batch.token_on_device.all()
            lens.append(batch.seq_lens.tolist())
            passes.append(batch)
        if not scheduler.num_in_flight:
            break
        scheduler.apply(StepOutput(next_token_ids=np.array([7])))
    assert lens == [[4], [5], [6]]  # the length is known ahead: no pass is wasted
    assert request.output.tolist() == [7, 7, 7]


def test_a_token_after_the_end_is_dropped():
    scheduler = make(overlap=True)
    request = add(scheduler, 4)
    scheduler.next_batch()
    scheduler.next_batch()
    applied = scheduler.apply(StepOutput(next_token_ids=np.array([EOS])))
    assert applied.finished == [request]
    late = scheduler.apply(StepOutput(next_token_ids=np.array([5])))
    assert len(late.token_ids) == 0
    assert request.output.tolist() == [EOS]
    assert scheduler.free_tokens == 64


def test_late_tokens_do_not_reach_the_next_owner_of_a_row():
    scheduler = make(overlap=True, rows=1, prefix_cache=False)
    add(scheduler, 4)
    second = add(scheduler, 5)
    scheduler.next_batch()
    scheduler.next_batch()
    scheduler.apply(StepOutput(next_token_ids=np.array([EOS])))
    batch = scheduler.next_batch()  # the second takes the row
    assert batch.seq_lens.tolist() == [5]
    scheduler.apply(StepOutput(next_token_ids=np.array([5])))
    scheduler.apply(StepOutput(next_token_ids=np.array([6])))
    assert scheduler.roster.table.known_len[second.row] == 6
    assert scheduler.roster.table.tokens[second.row, 5] == 6


def test_a_failed_pass_ends_those_who_are_still_in_it():
    scheduler = make(overlap=True)
    leaves, stays = add(scheduler, 4), add(scheduler, 5)
    scheduler.next_batch()
    scheduler.finish(leaves, "abort")
    other = add(scheduler, 6)
    scheduler.next_batch()
    applied = scheduler.fail("fell over")
    assert applied.finished == [stays]
    assert (leaves.finish_reason, stays.error) == ("abort", "fell over")
    scheduler.apply(StepOutput(next_token_ids=np.array([7])))
    assert not other.finished
