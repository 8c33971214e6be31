# SPDX-License-Identifier: Apache-2.0
"""Moving recorded rows on, against a list of requests."""

from __future__ import annotations

import random

import pytest
import torch

from bedplate.reference.decode_step import (
    CHANGE_WIDTH,
    HEADER_WIDTH,
    DecodeRows,
    advance_decode,
)

SIZE, ROWS, CONTEXT, FILL = 5, 7, 40, 1


def make_rows(index_dtype=torch.int32):
    def zeros(dtype):
        return torch.zeros(SIZE, dtype=dtype)

    return DecodeRows(
        input_ids=zeros(torch.int64), positions=zeros(torch.int64),
        req_pool_indices=zeros(torch.int32), seq_lens=zeros(torch.int32),
        out_cache_loc=zeros(index_dtype),
    )  # fmt: skip


def pack(count, changes, hold=0):
    flat = [count, len(changes), hold, 0]
    for change in changes:
        flat += change
    room = HEADER_WIDTH + SIZE * CHANGE_WIDTH
    return torch.tensor(flat + [99] * (room - len(flat)), dtype=torch.int32)


class Model:
    """Requests as a plain list of (row, length, slot)."""

    def __init__(self):
        self.rows, self.table = make_rows(), torch.zeros(ROWS, CONTEXT, dtype=torch.int32)
        self.tokens = torch.arange(ROWS) * 10
        self.members = []

    def step(self, members):
        moved = [(row, length + 1, slot + 1) for row, length, slot in self.members]
        changes = [
            (place, *member)
            for place, member in enumerate(members)
            if place >= len(moved) or moved[place] != member
        ]
        self.members = members
        advance_decode(pack(len(members), changes), self.rows, self.table, self.tokens, FILL)

    def check(self):
        rows, count = self.rows, len(self.members)
        padding = [(0, FILL, 0)] * (SIZE - count)
        want = [*self.members, *padding]
        got = zip(
            rows.req_pool_indices.tolist(), rows.seq_lens.tolist(),
            rows.out_cache_loc.tolist(), strict=True,
        )  # fmt: skip
        assert list(got) == want
        lengths = [length for _, length, _ in self.members]
        assert rows.positions.tolist() == [n - 1 for n in lengths] + [0] * (SIZE - count)
        tokens = [row * 10 for row, _, _ in self.members] + [0] * (SIZE - count)
        assert rows.input_ids.tolist() == tokens
        for row, length, slot in self.members:
            assert self.table[row, length - 1] == slot
        assert not self.table[0].any()


def test_requests_that_join_leave_and_turn_pages():
    rng = random.Random(3)
    model = Model()
    members = []
    for _ in range(60):
        staying = [m for m in members if rng.random() < 0.9 and m[1] + 1 < CONTEXT]
        turned = [rng.random() < 0.2 for _ in staying]
        members = [
            (row, length + 1, rng.randrange(1, 500) if turn else slot + 1)
            for (row, length, slot), turn in zip(staying, turned, strict=True)
        ]
        free = sorted(set(range(1, ROWS)) - {row for row, _, _ in members})
        while free and len(members) < SIZE and rng.random() < 0.4:
            members.append((free.pop(), rng.randrange(1, 20), rng.randrange(1, 500)))
        model.step(members)
        model.check()


def test_no_request_at_all():
    model = Model()
    model.step([])
    model.check()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_hold_leaves_everything(dtype):
    rows = make_rows(dtype)
    rows.seq_lens.fill_(9)
    rows.out_cache_loc.fill_(4)
    table = torch.zeros(ROWS, CONTEXT, dtype=torch.int32)
    advance_decode(pack(3, [(0, 1, 2, 3)], hold=1), rows, table, torch.ones(ROWS).long(), FILL)
    assert rows.seq_lens.tolist() == [9] * SIZE
    assert rows.out_cache_loc.tolist() == [4] * SIZE
    assert not table.any()
    assert not rows.input_ids.any()
