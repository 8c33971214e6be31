# SPDX-License-Identifier: Apache-2.0
"""Five hundred requests, aborts, faults and tiny pools: nobody harms anybody.

The executor answers with a hash of the history that it reads back through the slots, so a
survivor that equals its solo run has had every slot, position and token right.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest

from bedplate.engine.core import EngineCore
from bedplate.memory.allocator import PagedAllocator
from bedplate.memory.req_to_token import ReqToTokenPool
from bedplate.runner.sampling_params import SamplingParams
from bedplate.scheduling.scheduler import Scheduler
from bedplate.testing.null_executor import HistoryExecutor

VOCAB, EOS, POISON = 60, (0, 1), 59
CONTEXT = 96
NUM_REQUESTS = 500


class LetterCodec:
    """Token t is the letter t mod 26; prompts that begin with POISON cannot be shown."""

    def encode(self, text):
        return [ord(letter) - 97 for letter in text]

    def detokenizer(self, prompt, *, skip_special_tokens=True):
        return LetterDetokenizer(poisoned=prompt[0] == POISON)


class LetterDetokenizer:
    def __init__(self, *, poisoned):
        self.left = 3 if poisoned else 10**6

    def push(self, token_ids):
        self.left -= len(token_ids)
        if self.left < 0:
            raise UnicodeError("half a letter")
        return "".join(chr(97 + token % 26) for token in token_ids)


@dataclass
class FaultyPending:
    inner: object
    rng: random.Random
    size: int

    def ready(self):
        return True

    def wait(self):
        output = self.inner.wait()
        dice = self.rng.random()
        if dice < 0.004:
            raise RuntimeError("the device fell over")
        if dice < 0.05:
            row = self.rng.randrange(self.size)
            output.next_token_ids[row] = -1
            return replace(output, errors={row: "logits are not numbers"})
        return output


class FaultyExecutor(HistoryExecutor):
    rng = random.Random(5)

    def set_request(self, row, params, prompt_len):
        super().set_request(row, params, prompt_len)
        if self.rng.random() < 0.01:
            raise ValueError("no such sampler")

    def launch(self, batch):
        if self.rng.random() < 0.004:
            raise RuntimeError("the queue is full")
        return FaultyPending(super().launch(batch), self.rng, batch.batch_size)


@dataclass
class Asked:
    prompt: list[int]
    params: SamplingParams
    priority: int
    stream: bool


def ask(rng):
    """A request; many share a beginning."""
    trunk = [(7 * i + rng.randrange(3)) % VOCAB for i in range(40)][: rng.randrange(0, 40)]
    prompt = trunk + [rng.randrange(2, VOCAB) for _ in range(rng.randrange(1, 25))]
    if rng.random() < 0.05:
        prompt[0] = POISON
    elif prompt[0] == POISON:
        prompt[0] = 2
    most = rng.randrange(1, 30)
    params = SamplingParams(
        max_tokens=most,
        min_tokens=rng.randrange(0, most + 1) if rng.random() < 0.3 else 0,
        seed=rng.randrange(2**40),
        stop=("ab", "qz", "m") if rng.random() < 0.3 else (),
        stop_token_ids=tuple(rng.sample(range(VOCAB), 3)) if rng.random() < 0.2 else (),
        ignore_eos=rng.random() < 0.3,
        logprobs=0 if rng.random() < 0.2 else None,
        prompt_logprobs=0 if rng.random() < 0.2 else None,
    )
    return Asked(prompt, params, rng.choice((0, 0, 0, 1, 2)), rng.random() < 0.5)


def make_core(executor=HistoryExecutor, *, tokens=4096, rows=4, page=4, **options):
    overlap = options.get("overlap", False)
    allocator, pool = PagedAllocator(tokens, page), ReqToTokenPool(rows, CONTEXT)
    scheduler = Scheduler(
        allocator=allocator,
        req_to_token_pool=pool,
        page_size=page,
        max_context_len=CONTEXT,
        max_running_requests=rows,
        **{"max_prefill_tokens": 4096, **options},
    )
    runs = executor(
        tokens + page,
        pool.table.shape,
        vocab_size=VOCAB,
        eos_token_ids=EOS,
        asynchronous=overlap,
    )
    core = EngineCore(
        scheduler=scheduler, executor=runs, eos_token_ids=EOS, tokenizer=LetterCodec()
    )
    return core, scheduler, allocator, pool


@pytest.fixture(scope="module")
def asked():
    rng = random.Random(11)
    return [ask(rng) for _ in range(NUM_REQUESTS)]


@pytest.fixture(scope="module")
def solo(asked):
    """Each request alone, nothing shared, nothing planned ahead."""
    results = []
    core, *_ = make_core(prefix_cache=False)
    for one in asked:
        news = []
        core.add_request(one.prompt, one.params, sink=news.append)
        while core.has_work:
            core.step()
        results.append(news[-1].output)
    return results


def result(output):
    return (
        output.token_ids, output.text, output.finish_reason, output.stop_reason,
        output.logprobs, output.prompt_logprobs,
    )  # fmt: skip


CASES = [
    pytest.param({"page": 4}, id="plain"),
    pytest.param({"page": 1, "overlap": True}, id="overlap, tokens"),
    pytest.param({"page": 4, "overlap": True}, id="overlap"),
    pytest.param({"page": 4, "mixed": True}, id="mixed"),
    pytest.param({"page": 8, "mixed": True, "overlap": True}, id="mixed, overlap"),
    pytest.param({"page": 4, "prefix_cache": False, "overlap": True}, id="no cache"),
    pytest.param({"page": 1, "prefix_cache": False, "mixed": True}, id="no cache, tokens"),
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("faults", [False, True], ids=["well", "faulty"])
def test_survivors_equal_their_solo_runs(asked, solo, options, faults):
    rng = random.Random(3)
    FaultyExecutor.rng = random.Random(5)
    core, scheduler, allocator, pool = make_core(
        FaultyExecutor if faults else HistoryExecutor,
        tokens=160, rows=12, max_prefill_tokens=24, **options,
    )  # fmt: skip
    pieces: dict[str, list] = {}
    waiting = list(enumerate(asked))
    while core.has_work or waiting:
        for _ in range(rng.randrange(0, 4)):
            if waiting:
                index, one = waiting.pop()
                name = str(index)
                pieces[name] = []
                core.add_request(
                    one.prompt, one.params, request_id=name, priority=one.priority,
                    sink=pieces[name].append, stream=one.stream,
                )  # fmt: skip
        if faults and rng.random() < 0.06 and pieces:
            core.abort(rng.choice(list(pieces)))
        core.step()

    reasons = check_results(asked, solo, pieces)
    poisoned = sum(reason == "error" for reason in reasons)
    if not faults:
        assert "abort" not in reasons
        assert 0 < poisoned < 40  # those whose text cannot be made
    else:
        assert reasons.count("abort") > 20
        assert poisoned > 40
        assert sum(r in ("stop", "length") for r in reasons) > NUM_REQUESTS / 2
    check_nothing_leaked(scheduler, allocator, pool)


def check_results(asked, solo, pieces):
    reasons = []
    for name, news in pieces.items():
        one, alone, output = asked[int(name)], solo[int(name)], news[-1].output
        assert all(piece.output is None for piece in news[:-1])
        assert "".join(piece.text for piece in news) == output.text
        assert sum((piece.token_ids for piece in news), ()) == output.token_ids
        assert output.prompt_token_ids == tuple(one.prompt)
        reasons.append(output.finish_reason)
        if output.finish_reason in ("stop", "length"):
            assert result(output) == result(alone)
        else:
            assert output.token_ids == alone.token_ids[: len(output.token_ids)]
            assert bool(output.error) == (output.finish_reason == "error")
    assert len(reasons) == NUM_REQUESTS
    return reasons


def check_nothing_leaked(scheduler, allocator, pool):
    cache = scheduler.slots.cache
    held = 0 if cache is None else cache.total_size
    assert allocator.available_size() + held == 160
    assert pool.available_size == pool.size
    assert not scheduler.has_requests
    assert scheduler.num_in_flight == 0
    if cache is not None:
        assert cache.evictable_size == held > 0
        assert cache.clear() == held
    assert allocator.available_size() == 160
