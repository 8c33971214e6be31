# SPDX-License-Identifier: Apache-2.0
"""How requests end, and how far a failure reaches."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bedplate.errors import ConfigError, InternalError
from bedplate.runner.sampling_params import SamplingParams

GO_ON = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)


@pytest.fixture(params=[False, True], ids=["plain", "overlap"])
def client(request, make_client):
    with make_client(overlap=request.param) as client:
        yield client


def spell(client, prompt, text):
    """Make the executor answer ``text`` after ``prompt``; a dot is the end token."""
    for place, letter in enumerate(text):
        client.executor.script[len(prompt) + place] = 0 if letter == "." else ord(letter) - 97


@pytest.mark.parametrize(
    ("answer", "params", "text", "tokens", "reason"),
    [
        ("hello.", {}, "hello", 6, ("stop", 0)),
        ("hello.", {"ignore_eos": True, "max_tokens": 6}, "helloa", 6, ("length", None)),
        ("hello.", {"max_tokens": 3}, "hel", 3, ("length", None)),
        ("hello.", {"stop_token_ids": (11,)}, "he", 3, ("stop", 11)),
        ("hello.", {"stop": ("ll",)}, "he", 4, ("stop", "ll")),
        ("hello.", {"stop": ("zz", "lo", "l")}, "he", 3, ("stop", "l")),
        ("helper.", {"stop": ("lpq",)}, "helper", 7, ("stop", 0)),  # held back, then shown
        ("hello.", {"stop": ("lo",), "max_tokens": 5}, "hel", 5, ("stop", "lo")),
        ("hel", {"stop": ("lo",), "max_tokens": 3}, "hel", 3, ("length", None)),
        ("h.llo.", {"min_tokens": 3}, "hallo", 6, ("stop", 0)),
        ("lllo.", {"stop": ("l",), "min_tokens": 2}, "l", 2, ("stop", "l")),
        (".", {}, "", 1, ("stop", 0)),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_how_a_request_ends(client, answer, params, text, tokens, reason, stream):
    spell(client, "abc", answer)
    params = SamplingParams(**{"max_tokens": 20, **params})
    if stream:
        pieces = list(client.stream("abc", params))
        output = pieces[-1].output
        assert "".join(piece.text for piece in pieces) == text
        assert sum((piece.token_ids for piece in pieces), ()) == output.token_ids
    else:
        output = client.generate("abc", params)[0]
    assert output.text == text
    assert len(output.token_ids) == tokens
    assert (output.finish_reason, output.stop_reason) == reason


def test_logprobs_of_new_and_given_tokens(client):
    params = replace(GO_ON, logprobs=0, prompt_logprobs=0)
    client.generate("abcdefghijklmnop", GO_ON)  # a cached prefix must not hide the prompt's
    output = client.generate("abcdefghijklmnopqrst", params)[0]
    assert [entry.token_id for entry in output.logprobs] == list(output.token_ids)
    assert [entry.token_id for entry in output.prompt_logprobs] == list(range(1, 20))
    assert [entry.logprob for entry in output.prompt_logprobs] == [
        -float(n) for n in range(1, 20)
    ]
    assert client.generate("abc", GO_ON)[0].logprobs is None


def test_unset_seeds_are_drawn_from_the_engines(make_client):
    def ask(seed):
        unseeded = replace(GO_ON, seed=None)
        with make_client(seed=seed) as client:
            return [output.token_ids for output in client.generate(["abc"] * 2, unseeded)]

    first, again, other = ask(3), ask(3), ask(4)
    assert first == again
    assert first[0] != first[1]
    assert first != other


def test_a_cached_prefix_changes_nothing_but_the_count(client):
    first, second = (client.generate("abcdefghij", GO_ON)[0] for _ in range(2))
    assert first.token_ids == second.token_ids
    assert (first.cached_tokens, second.cached_tokens) == (0, 8)


def test_names_are_unique_while_they_run(client):
    client.add_request("abc", GO_ON, request_id="one")
    with pytest.raises(ConfigError, match="'one' is running"):
        client.add_request("abc", GO_ON, request_id="one")
    while client.core.has_work:
        client.step()
    client.add_request("abc", GO_ON, request_id="one")


def test_without_a_tokenizer_there_are_tokens_only(make_client):
    with make_client(tokenizer=False) as client:
        output = client.generate([1, 2, 3], GO_ON)[0]
        assert (output.text, len(output.token_ids)) == ("", 8)
        with pytest.raises(ConfigError, match="stop strings"):
            client.generate([1], replace(GO_ON, stop=("a",)))


# Failures.


def ask_two(client):
    """Outputs of a request that will fail and of one that begins after it."""
    results = {}
    client.add_request("abc", GO_ON, request_id="bad", sink=lambda d: results.update(bad=d))
    for _ in range(3):
        client.step()
    client.add_request("de", GO_ON, request_id="good", sink=lambda d: results.update(good=d))
    while client.core.has_work:
        client.step()
    return results["bad"].output, results["good"].output


def once(failure):
    def fail(value):
        if fail.left:
            fail.left = False
            return failure(value)
        return value

    fail.left = True
    return fail


def raises(error):
    def fail(_):
        raise error

    return fail


def test_a_request_whose_logits_are_wrong_ends_alone(client):
    client.executor.after = once(lambda output: replace(output, errors={0: "not numbers"}))
    bad, good = ask_two(client)
    assert (bad.finish_reason, bad.error) == ("error", "not numbers")
    assert (good.finish_reason, good.error) == ("length", "")


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_pass_that_raises_takes_its_requests_along(client, where, caplog):
    setattr(client.executor, where, once(raises(RuntimeError("fell over"))))
    bad, good = ask_two(client)
    assert bad.error == "RuntimeError: fell over"
    assert good.finish_reason == "length"
    assert "fell over" in caplog.text


def test_the_backend_explains(make_client):
    with make_client(explain_error=lambda error: f"Because of {error}.") as client:
        client.executor.after = once(raises(RuntimeError("heat")))
        assert ask_two(client)[0].error == "RuntimeError: heat. Because of heat."


def test_tokens_before_a_failed_launch_are_delivered(make_client):
    with make_client(overlap=True) as client:
        name = client.add_request("abc", GO_ON)
        client.step()
        client.step()
        client.executor.before = once(raises(RuntimeError("full")))
        outputs = []
        while client.core.has_work:
            outputs += client.step().outputs
        assert [output.request_id for output in outputs] == [name]
        assert len(outputs[0].token_ids) == 2


def test_a_request_that_the_executor_refuses(client, monkeypatch):
    inner = client.executor.set_request

    def refuse(row, params, prompt_len):
        if prompt_len == 3:
            raise ValueError("cannot sample so")
        inner(row, params, prompt_len)

    inner(1, GO_ON, 3)
    monkeypatch.setattr(client.executor, "set_request", refuse)
    bad, good = ask_two(client)
    assert bad.error == "ValueError: cannot sample so"
    assert good.finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_text_that_cannot_be_made(client, stream):
    seen = []
    client.add_request("ax", GO_ON, sink=seen.append, stream=stream)
    good = client.generate("de", GO_ON)[0]
    assert seen[-1].output.error == "UnicodeError: no such letter"
    assert good.finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_listener_that_raises(client, stream, caplog):
    def sink(delta):
        raise BufferError("nobody listens")

    client.add_request("abc", GO_ON, sink=sink, stream=stream)
    outputs = []
    while client.core.has_work:
        outputs += client.step().outputs
    error = "BufferError: nobody listens"
    assert [output.error for output in outputs] == [error if stream else ""]
    assert error in caplog.text
    assert not client.scheduler.has_requests


def test_a_listener_may_abort_another(client):
    victim = client.add_request("abc", GO_ON)
    client.add_request("de", replace(GO_ON, max_tokens=2), sink=lambda _: client.abort(victim))
    outputs = []
    while client.core.has_work:
        outputs += client.step().outputs
    assert {output.finish_reason for output in outputs} == {"abort", "length"}


def test_an_interrupt_while_waiting_leaves_nothing_behind(client):
    client.executor.after = once(raises(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        client.generate(["abc", "de"], GO_ON)
    assert client.generate("abc", GO_ON)[0].finish_reason == "length"
    assert not client.scheduler.has_requests


def test_no_way_on_is_our_mistake(client, monkeypatch):
    client.add_request("abc", GO_ON)
    monkeypatch.setattr(client.scheduler, "next_batch", lambda: None)
    with pytest.raises(InternalError, match="1 requests wait"):
        client.step()


# Statistics.


def test_observers_hear_of_every_step(make_client):
    seen = []
    with make_client(observers=[seen.append]) as client:
        client.generate(["abc", "de"], GO_ON)
    assert [stats.step for stats in seen] == list(range(1, 9))
    assert [stats.mode for stats in seen] == ["EXTEND"] + ["DECODE"] * 7
    assert [stats.num_tokens for stats in seen] == [5] + [2] * 7
    assert {stats.num_requests for stats in seen} == {2}
    assert all(0 < stats.host_us <= stats.total_us for stats in seen)
    assert (seen[-1].free_tokens, seen[-1].queued) == (128, 0)
    assert (seen[-1].graph, seen[-1].graph_reason) == (None, "no model")


def test_a_step_says_which_request_got_which_token(client):
    client.add_request("abc", GO_ON)
    client.add_request("de", GO_ON)
    collected = {1: [], 2: []}
    outputs = []
    while client.core.has_work:
        result = client.step()
        for number, token in zip(
            result.numbers.tolist(), result.token_ids.tolist(), strict=True
        ):
            collected[number].append(token)
        outputs += result.outputs
    assert [list(output.token_ids) for output in outputs] == [collected[1], collected[2]]
    assert outputs[0].to_dict()["finish_reason"] == "length"
