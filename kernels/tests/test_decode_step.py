# SPDX-License-Identifier: Apache-2.0
"""Decode steps against a plain model of requests that join, grow and leave."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from kernels.tests.offline import compile_launches

from bedplate.errors import ContractError, UnsupportedError
from bedplate.reference import decode_step as reference
from bedplate.reference.decode_step import DecodeRows
from bedplate_triton import decode_step
from bedplate_triton.decode_step import MAX_ROWS, advance_decode
from bedplate_triton.features import Features

PAGE, CONTEXT, OWNERS, FILL_LEN = 4, 64, 40, 1


def rows_of(size, device="cpu", index=torch.int32):
    kinds = (torch.int64, torch.int64, torch.int32, torch.int32, index)
    names = ("input_ids", "positions", "req_pool_indices", "seq_lens", "out_cache_loc")
    # Whatever lies there at first must not matter: changes describe every new member.
    return DecodeRows(
        **{
            name: torch.full((size,), 5, dtype=kind, device=device)
            for name, kind in zip(names, kinds, strict=True)
        }
    )


class Plain:
    """The truth: dictionaries and lists of a host that knows everything.

    ``places`` holds request rows in the order of the batch; ``slots`` and ``last`` are by
    request row.
    """

    def __init__(self, size, seed):
        self.random = random.Random(seed)
        self.size = size
        self.places, self.slots, self.last = [], {}, {}
        self.free_owners = list(range(1, OWNERS))
        self.next_page = 1
        self.told, self.joined = [], []

    def grow(self, owner):
        """One more slot: the next of its page, or the first of a new one."""
        slots = self.slots[owner]
        if not slots or slots[-1] % PAGE == PAGE - 1:
            slots.append(self.next_page * PAGE)
            self.next_page += 1
        else:
            slots.append(slots[-1] + 1)

    def leave(self, place):
        """The last member takes the free place."""
        owner = self.places[place]
        self.places[place] = self.places[-1]
        self.places.pop()
        self.free_owners.append(owner)

    def join(self):
        owner = self.free_owners.pop(self.random.randrange(len(self.free_owners)))
        self.slots[owner] = []
        for _ in range(self.random.randint(1, 9)):
            self.grow(owner)
        self.places.append(owner)
        self.joined.append(owner)

    def step(self):
        """Members and lengths of the next pass; returns the changes that must be told."""
        self.joined = []
        for place in reversed(range(len(self.places))):
            full = len(self.slots[self.places[place]]) == CONTEXT
            if full or self.random.random() < 0.2:
                self.leave(place)
        while len(self.places) < self.size and self.random.random() < 0.5:
            self.join()
        followed = dict(enumerate(self.told))
        changes, self.told = [], []
        for place, owner in enumerate(self.places):
            self.grow(owner)
            slot, length = self.slots[owner][-1], len(self.slots[owner])
            if followed.get(place) != (owner, length - 1, slot - 1):
                changes.append((place, owner, length, slot))
            self.told.append((owner, length, slot))
        self.random.shuffle(changes)
        return changes

    def expected(self):
        """Columns of the pass in the order of ``DecodeRows``."""
        real = [
            (self.last[owner], len(self.slots[owner]) - 1, owner, len(self.slots[owner]),
             self.slots[owner][-1])
            for owner in self.places
        ]  # fmt: skip
        padding = [(0, 0, 0, FILL_LEN, 0)] * (self.size - len(real))
        return [list(column) for column in zip(*real, *padding, strict=True)]


FUNCTIONS = {
    "reference": reference.advance_decode,
    "kernel": partial(advance_decode, features=Features()),
}


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("size", [1, 6, 19])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_follows_requests_that_join_and_leave(function, size, index, device):
    plain = Plain(size, seed=size)
    rows = rows_of(size, device, index)
    table = torch.zeros((OWNERS, CONTEXT), dtype=torch.int32, device=device)
    last_tokens = torch.zeros(OWNERS, dtype=torch.int64, device=device)
    counts = set()
    for _ in range(80):
        changes = plain.step()
        counts.add(len(changes))
        for owner in plain.joined:  # what a prefill wrote
            prompt = torch.tensor(plain.slots[owner][:-1], dtype=torch.int32)
            table[owner, : len(prompt)] = prompt.to(device)
        for owner in plain.places:  # what the pass before sampled
            plain.last[owner] = plain.random.randrange(1000)
            last_tokens[owner] = plain.last[owner]
        told = torch.full((4 + 4 * size,), -1, dtype=torch.int32)
        flat = [len(plain.places), len(changes), 0, -1, *sum(changes, ())]
        told[: len(flat)] = torch.tensor(flat, dtype=torch.int32)
        function(told.to(device), rows, table, last_tokens, FILL_LEN)
        got = [rows.input_ids, rows.positions, rows.req_pool_indices, rows.seq_lens,
               rows.out_cache_loc]  # fmt: skip
        assert [column.tolist() for column in got] == plain.expected()
        for owner in plain.places:
            assert table[owner, : len(plain.slots[owner])].tolist() == plain.slots[owner]
    assert 0 in counts
    assert size == 1 or max(counts) > 1


def test_no_rows(device):
    rows = rows_of(0, device)
    changes = torch.zeros(4, dtype=torch.int32, device=device)
    table = torch.zeros((1, 4), dtype=torch.int32, device=device)
    last_tokens = torch.zeros(1, dtype=torch.int64, device=device)
    advance_decode(changes, rows, table, last_tokens, 1, features=Features())


def arguments(size=3):
    return {
        "changes": torch.zeros(4 + 4 * size, dtype=torch.int32, device="meta"),
        "rows": rows_of(size, "meta"),
        "req_to_token": torch.empty((9, 8), dtype=torch.int32, device="meta"),
        "last_tokens": torch.empty(9, dtype=torch.int64, device="meta"),
        "fill_len": 1,
        "features": Features(),
    }


def test_refuses_more_rows_than_one_program_holds():
    with pytest.raises(UnsupportedError, match="at most 1024 rows"):
        advance_decode(**arguments(MAX_ROWS + 1))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"changes": torch.zeros(40, dtype=torch.int32)[::2]}, "adjacent"),
        ({"last_tokens": torch.zeros(18, dtype=torch.int64)[::2]}, "adjacent"),
        ({"req_to_token": torch.zeros((8, 9), dtype=torch.int32).T}, "adjacent"),
        (
            {
                "rows": DecodeRows(
                    input_ids=torch.zeros(2), positions=torch.zeros(3),
                    req_pool_indices=torch.zeros(3), seq_lens=torch.zeros(3),
                    out_cache_loc=torch.zeros(3),
                )
            },
            r"rows of \[\[2\], \[3\]",
        ),
    ],
)  # fmt: skip
def test_refuses_what_does_not_fit(change, match):
    with pytest.raises(ContractError, match=match):
        advance_decode(**{**arguments(), **change})


def test_one_launch_reads_nothing_on_the_host(monkeypatch):
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: grids.append(grid)

    monkeypatch.setattr(decode_step, "_advance_kernel", Kernel())
    advance_decode(**arguments())  # a read from meta raises
    assert grids == [(1,)]


def test_compiles_with_barriers_and_once_for_batches_of_a_class():
    compiled = compile_launches(
        "bedplate_triton.decode_step",
        "import torch\n"
        "from bedplate.reference.decode_step import DecodeRows\n"
        "from bedplate_triton.features import Features\n"
        "def empty(*shape, dtype=torch.int32):\n"
        "    return torch.empty(shape, dtype=dtype, device='meta')\n"
        "for size in (1, 7, 16, 32, 300, 512):\n"
        "    wide, narrow = empty(size, dtype=torch.int64), empty(size)\n"
        "    rows = DecodeRows(input_ids=wide, positions=wide, req_pool_indices=narrow,\n"
        "                      seq_lens=narrow, out_cache_loc=narrow)\n"
        "    last = empty(2000, dtype=torch.int64)\n"
        "    advance_decode(empty(4 + 4 * size), rows, empty(2000, 4096), last, 1,\n"
        "                   features=Features(arch='sm_90'))\n",
    )
    assert len({kernel["assembly"] for kernel in compiled}) == 2
    for kernel in compiled:
        assert kernel["stack"] == 0
        assert barriers_between_scatter_and_reload(kernel["assembly"])
    assert "bar.sync" in compiled[-1]["assembly"]


def barriers_between_scatter_and_reload(assembly):
    """Whether a barrier follows the scattered writes before anything is read again."""
    kinds = [
        kind
        for line in assembly.splitlines()
        for kind in ("st.global", "ld.global", "bar.sync", "bar.warp.sync")
        if kind in line
    ]
    first_write = kinds.index("st.global")
    after = [kind for kind in kinds[first_write:] if kind != "st.global"]
    return after[0].startswith("bar")
