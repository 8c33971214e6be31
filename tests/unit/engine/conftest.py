# SPDX-License-Identifier: Apache-2.0
"""An engine core over the history executor, with letters for text."""

from __future__ import annotations

import pytest

from bedplate.engine.client import EngineClient
from bedplate.engine.core import EngineCore
from bedplate.memory.allocator import PagedAllocator
from bedplate.memory.req_to_token import ReqToTokenPool
from bedplate.scheduling.scheduler import Scheduler
from bedplate.testing.null_executor import HistoryExecutor


class Letters:
    """Token t is the letter t; 'x' in a prompt cannot be detokenized."""

    def encode(self, text):
        return [ord(letter) - 97 for letter in text]

    def detokenizer(self, prompt, *, skip_special_tokens=True):
        self.skip = skip_special_tokens
        return LetterStream(broken=23 in prompt)


class LetterStream:
    def __init__(self, *, broken):
        self.broken = broken

    def push(self, token_ids):
        if self.broken:
            raise UnicodeError("no such letter")
        return "".join(chr(97 + token) for token in token_ids)


class ScriptedExecutor(HistoryExecutor):
    """Answers ``script[length]`` where there is one, else the hash."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.script: dict[int, int] = {}
        self.before = lambda batch: None
        self.after = lambda output: output

    def _answer(self, row, length):
        return self.script.get(length, super()._answer(row, length))

    def launch(self, batch):
        self.before(batch)
        done = super().launch(batch)
        return Later(done, self.after)


class Later:
    def __init__(self, done, after):
        self.done, self.after = done, after

    def wait(self):
        return self.after(self.done.wait())


@pytest.fixture
def make_client():
    def make(*, overlap=False, tokenizer=True, rows=4, **options):
        pool = ReqToTokenPool(rows, 64)
        scheduler = Scheduler(
            allocator=PagedAllocator(128, 4),
            req_to_token_pool=pool,
            page_size=4,
            max_context_len=64,
            max_running_requests=rows,
            max_prefill_tokens=16,
            overlap=overlap,
        )
        executor = ScriptedExecutor(
            132, pool.table.shape, vocab_size=20, eos_token_ids=(0,), asynchronous=overlap
        )
        core = EngineCore(
            scheduler=scheduler, executor=executor, eos_token_ids=(0,),
            tokenizer=Letters() if tokenizer else None, vocab_size=26, **options,
        )  # fmt: skip
        client = EngineClient(core)
        client.executor, client.scheduler = executor, scheduler
        return client

    return make
