# SPDX-License-Identifier: Apache-2.0
"""A bench that runs a tiny model through the bridge, packed and paged, and checks the result.

Slots come from shuffled pages; every pass is a ``ForwardBatch`` built by hand.  The oracle is
transformers' eager attention over each whole sequence, given the tokens that were chosen here.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field

import torch

from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
from bedplate.batch.forward_mode import ForwardMode
from bedplate.contract.attention import AttentionBuild
from bedplate.contract.memory import KVPoolRequest
from bedplate.memory.kv_pool import LayeredKVPool
from bedplate.models import transformers_api as hf
from bedplate.models.adapter import HFModel
from bedplate.reference.attention import ReferenceAttention
from bedplate.reference.runtime import TorchRuntime

PAGE_SIZE = 4
NUM_PAGES = 64
MAX_REQUESTS = 8
MAX_CONTEXT_LEN = 128


@dataclass
class Sequence:
    """One request: its row, its tokens so far, and the logits seen by position."""

    row: int
    tokens: list[int]
    cached: int = 0
    slots: list[int] = field(default_factory=list)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)


class Rig:
    """Pools, attention and one model; sequences are advanced in packed passes."""

    def __init__(self, module, spec, *, seed=0, backend=ReferenceAttention, check=True):
        self.oracle = copy.deepcopy(module)
        self.model = HFModel(module, spec, check=check)
        runtime = TorchRuntime("cpu")
        pool = LayeredKVPool(
            KVPoolRequest(
                runtime=runtime,
                calls=spec.calls,
                num_tokens=NUM_PAGES * PAGE_SIZE,
                page_size=PAGE_SIZE,
                dtype=torch.float32,
            )
        )
        self.req_to_token = torch.zeros(MAX_REQUESTS, MAX_CONTEXT_LEN, dtype=torch.int32)
        build = AttentionBuild(
            runtime=runtime,
            calls=spec.calls,
            kv_pool=pool,
            req_to_token=self.req_to_token,
            page_size=PAGE_SIZE,
            dtype=torch.float32,
            max_batch_size=MAX_REQUESTS,
            max_context_len=MAX_CONTEXT_LEN,
        )
        self.attention = backend(build)
        self.model.bind_attention(self.attention)
        self.pages = list(range(1, NUM_PAGES + 1))
        random.Random(seed).shuffle(self.pages)
        self.rows = list(range(MAX_REQUESTS - 1, 0, -1))

    def start(self, tokens, *, like=None, shared=0):
        """A new request; its first ``shared`` tokens reuse the slots of ``like``."""
        sequence = Sequence(self.rows.pop(), list(tokens))
        if like is not None:
            assert shared % PAGE_SIZE == 0
            assert like.tokens[:shared] == sequence.tokens[:shared]
            sequence.slots = like.slots[:shared]
            sequence.cached = shared
            self._write_row(sequence)
        return sequence

    def preempt(self, sequence):
        """Forget everything that is cached for a request; its slots are spoiled."""
        sequence.cached, sequence.slots = 0, []
        self.req_to_token[sequence.row] = 0

    def extend(self, *parts):
        """One EXTEND pass: ``(sequence, number of its tokens that are new)`` each."""
        batch = self._batch(ForwardMode.EXTEND, parts)
        self._run(batch, parts)

    def decode(self, *sequences):
        """Append each request's most likely next token and run one DECODE pass."""
        for sequence in sequences:
            last = sequence.logits[len(sequence.tokens) - 1]
            sequence.tokens.append(int(last.argmax()))
        parts = [(sequence, 1) for sequence in sequences]
        self._run(self._batch(ForwardMode.DECODE, parts), parts)

    def spread(self, *sequences):
        """Standard deviation of the logits that were seen."""
        seen = [logits for sequence in sequences for logits in sequence.logits.values()]
        return float(torch.stack(seen).std())

    def check(self, *sequences):
        """Largest logit error against the oracle, over every position that was seen."""
        worst = 0.0
        for sequence in sequences:
            expected = oracle_logits(self.oracle, sequence.tokens)
            for position, logits in sequence.logits.items():
                worst = max(worst, float((logits - expected[position]).abs().max()))
        return worst

    def disagreements(self, *sequences):
        """Chosen tokens that the oracle would not have chosen, with its top-2 margin there."""
        found = []
        for sequence in sequences:
            expected = oracle_logits(self.oracle, sequence.tokens)
            for position, logits in sequence.logits.items():
                best = expected[position].topk(2).values
                if logits.argmax() != expected[position].argmax():
                    found.append((sequence.row, position, float(best[0] - best[1])))
        return found

    def _batch(self, mode, parts):
        news, prefixes, tokens, positions, slots = [], [], [], [], []
        for sequence, new in parts:
            prefix = sequence.cached
            self._grow(sequence, prefix + new)
            news.append(new)
            prefixes.append(prefix)
            tokens += sequence.tokens[prefix : prefix + new]
            positions += range(prefix, prefix + new)
            slots += sequence.slots[prefix : prefix + new]
        ints = {"dtype": torch.int32}
        seq_lens = torch.tensor([p + n for p, n in zip(prefixes, news, strict=True)], **ints)
        extend = None
        if mode.is_extend():
            new, prefix = torch.tensor(news, **ints), torch.tensor(prefixes, **ints)
            start = (new.cumsum(0) - new).to(torch.int32)
            extend = ExtendPart(
                seq_lens=new,
                prefix_lens=prefix,
                start_loc=start,
                seq_lens_cpu=new,
                prefix_lens_cpu=prefix,
            )
        wanted = None
        if mode.is_extend() and random.Random(len(tokens)).random() < 0.5:
            wanted = torch.tensor(news).cumsum(0) - 1
        return ForwardBatch(
            mode=mode,
            batch_size=len(parts),
            input_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            req_pool_indices=torch.tensor([s.row for s, _ in parts], **ints),
            seq_lens=seq_lens,
            seq_lens_cpu=seq_lens,
            out_cache_loc=torch.tensor(slots),
            logits_rows=wanted,
            extend=extend,
        )

    def _grow(self, sequence, length):
        while len(sequence.slots) < length:
            page = self.pages.pop()
            sequence.slots += range(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
        self._write_row(sequence)

    def _write_row(self, sequence):
        self.req_to_token[sequence.row, : len(sequence.slots)] = torch.tensor(
            sequence.slots, dtype=torch.int32
        )

    @torch.inference_mode()
    def _run(self, batch, parts):
        self.attention.prepare(batch)
        self.model.check_lengths(batch)
        logits = self.model.forward(batch).next_token_logits
        row = 0
        for sequence, new in parts:
            end = sequence.cached + new
            kept = (
                range(end - 1, end)
                if batch.logits_rows is not None
                else range(sequence.cached, end)
            )
            for position in kept:
                sequence.logits[position] = logits[row]
                row += 1
            sequence.cached = end
        assert row == len(logits)


@torch.no_grad()
def oracle_logits(model, tokens):
    """``[T, V]`` of transformers' own eager attention over the whole sequence."""
    hf.set_attention(model, "eager")
    ids = torch.tensor([tokens])
    # Upstream quirk (transformers 5.17, Moshi): without this mask eager attention looks ahead.
    mask = torch.ones_like(ids)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
