# SPDX-License-Identifier: Apache-2.0
"""Asking: batches, streams, asyncio, aborts."""

from __future__ import annotations

import asyncio

import pytest

from bedplate.errors import ConfigError, RequestTooLongError
from bedplate.runner.sampling_params import SamplingParams

GO_ON = SamplingParams(max_tokens=12, ignore_eos=True, seed=1)


@pytest.fixture(params=[False, True], ids=["plain", "overlap"])
def client(request, make_client):
    with make_client(overlap=request.param) as client:
        yield client


def test_answers_come_in_order_whatever_finishes_first(client):
    outputs = client.generate(
        ["abc", "abd", "q"], [SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 1, 5)]
    )
    assert [len(output.token_ids) for output in outputs] == [9, 1, 5]
    assert [output.prompt_token_ids for output in outputs] == [(0, 1, 2), (0, 1, 3), (16,)]
    assert all(o.text == "".join(chr(97 + t) for t in o.token_ids) for o in outputs)


@pytest.mark.parametrize(
    ("prompts", "count"),
    [("abc", 1), ([1, 2, 3], 1), ([[1, 2], [3]], 2), (["a", [1]], 2), ([], 0)],
)
def test_one_prompt_or_several(client, prompts, count):
    assert len(client.generate(prompts, GO_ON)) == count


def test_more_requests_than_rows(client):
    together = client.generate(["abc"] * 11, GO_ON)
    assert {output.token_ids for output in together} == {together[0].token_ids}
    assert len(together) == 11


def test_progress_ends_with_everything(client):
    told = []
    client.generate(["a", "b"], GO_ON, progress=lambda *news: told.append(news))
    assert told[0] == (0, 2)
    assert told[-1] == (2, 2)


def test_a_wrong_prompt_begins_nothing(client):
    with pytest.raises(RequestTooLongError):
        client.generate(["abc", "a" * 60], GO_ON)
    with pytest.raises(ConfigError, match="2 sampling settings for 3 prompts"):
        client.generate(["a", "b", "c"], [GO_ON, GO_ON])
    client.step()
    assert not client.core.has_work
    assert not client.scheduler.has_requests


def test_an_interrupted_batch_is_aborted(client):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.generate(["a", "b"], GO_ON, progress=interrupt)
    client.step()
    assert not client.scheduler.has_requests


def test_a_stream_is_the_answer_in_pieces(client):
    whole = client.generate("abc", GO_ON)[0]
    pieces = list(client.stream("abc", GO_ON))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert sum((piece.token_ids for piece in pieces), ()) == whole.token_ids
    assert [piece.output is None for piece in pieces[:-1]] == [True] * (len(pieces) - 1)
    assert pieces[-1].output.token_ids == whole.token_ids
    assert len(pieces) > 6


def test_leaving_a_stream_aborts(client):
    stream = client.stream("abc", GO_ON)
    next(stream)
    stream.close()
    client.step()
    assert not client.scheduler.has_requests


def test_requests_by_hand(client):
    name = client.add_request("abc", GO_ON, request_id="mine")
    outputs = []
    while client.core.has_work:
        outputs += client.step().outputs
    assert [output.request_id for output in outputs] == [name] == ["mine"]
    assert outputs[0].timings.finished_s >= outputs[0].timings.first_token_s


def test_an_abort_keeps_what_there_is(client):
    name = client.add_request("abc", GO_ON)
    for _ in range(4):
        client.step()
    client.abort(name)
    output = client.step().outputs[0]
    assert output.finish_reason == "abort"
    assert 2 <= len(output.token_ids) <= 4
    assert output.text == "".join(chr(97 + t) for t in output.token_ids)
    client.abort(name)
    client.abort("nobody")
    client.step()
    assert not client.core.has_work


def test_closing_ends_everything(client):
    seen = []
    client.add_request("abc", GO_ON, sink=seen.append)
    client.step()
    client.close()
    client.close()
    assert seen[-1].output.finish_reason == "abort"
    assert not client.core.has_work


# asyncio.


def test_async_answers_equal_sync_ones(client):
    async def ask():
        return await client.async_generate(["abc", "de"], GO_ON)

    expected = client.generate(["abc", "de"], GO_ON)
    got = asyncio.run(ask())
    assert [o.token_ids for o in got] == [o.token_ids for o in expected]


def test_async_stream(client):
    async def ask():
        return [piece async for piece in client.astream("abc", GO_ON)]

    pieces = asyncio.run(ask())
    assert "".join(piece.text for piece in pieces) == pieces[-1].output.text
    assert len(pieces[-1].output.token_ids) == 12


def test_many_tasks_at_once(client):
    async def ask():
        return await asyncio.gather(
            *(client.async_generate(["abc", "bcd"], GO_ON) for _ in range(10))
        )

    answers = asyncio.run(ask())
    assert len({answer[0].token_ids for answer in answers}) == 1


def test_cancelling_aborts(client):
    async def ask():
        task = asyncio.ensure_future(client.async_generate("abc", GO_ON))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await client.async_generate("abc", GO_ON)

    assert asyncio.run(ask())[0].finish_reason == "length"


def test_a_wrong_prompt_in_asyncio(client):
    async def ask():
        with pytest.raises(RequestTooLongError):
            await client.async_generate(["abc", "a" * 60], GO_ON)
        with pytest.raises(RequestTooLongError):
            async for _ in client.astream("a" * 60, GO_ON):
                pass

    asyncio.run(ask())


def test_a_broken_loop_tells_everybody(make_client, monkeypatch, caplog):
    client = make_client()

    def broken():
        raise ArithmeticError("plan")

    async def ask():
        return await client.async_generate(["abc", "d"], GO_ON)

    monkeypatch.setattr(client.scheduler, "next_batch", broken)
    outputs = asyncio.run(ask())
    assert [output.error for output in outputs] == ["ArithmeticError: plan"] * 2
    monkeypatch.undo()
    assert asyncio.run(ask())[0].finish_reason == "length"
    client.close()


def test_threads_take_turns(client):
    async def ask():
        other = asyncio.to_thread(client.generate, ["abc", "de"], GO_ON)
        mine = client.async_generate(["abc", "de"], GO_ON)
        return await asyncio.gather(other, mine)

    other, mine = asyncio.run(ask())
    assert [o.token_ids for o in other] == [o.token_ids for o in mine]
