# SPDX-License-Identifier: Apache-2.0
"""The model's own count is replaced, in its own shape, while the seam is there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bedplate.models.position_seam import PastLength, PositionSeam, counting_modules


class Decoder(nn.Module):
    """Counts its tokens and hands the count on."""

    def __init__(self):
        super().__init__()
        self.embed = Embedding()

    def forward(self, length):
        return self.embed("x", position_ids=torch.arange(length))


class Embedding(nn.Module):
    def forward(self, _shape, position_ids=None):
        return position_ids


def test_positions_replace_the_count():
    model = Decoder()
    seam = PositionSeam(model, ["embed"])
    seam.positions = torch.tensor([4, 5, 0])
    assert model(3).tolist() == [4, 5, 0]
    seam.positions = torch.tensor([9])
    assert model(1).tolist() == [9]


def test_the_replacement_takes_the_counts_shape():
    model = Decoder()
    seam = PositionSeam(model, ["embed"])
    seam.positions = torch.tensor([[4, 5, 0]])
    assert model(3).shape == (3,)


def test_a_removed_seam_leaves_the_count():
    model = Decoder()
    seam = PositionSeam(model, ["embed"])
    seam.positions = torch.tensor([7, 7])
    seam.remove()
    assert model(2).tolist() == [0, 1]


def test_before_the_first_pass_the_count_stays():
    model = Decoder()
    PositionSeam(model, ["embed"])
    assert model(2).tolist() == [0, 1]


def test_count_and_past_length_give_the_position():
    positions = torch.tensor([0, 1, 2, 0, 1, 9])
    past = PastLength(positions).get_seq_length(3)
    assert (torch.arange(6) + past).tolist() == positions.tolist()


def test_a_disturbed_count_is_corrected_too():
    positions = torch.tensor([5, 6, 7])
    counted = torch.arange(3) + 100
    assert (counted + PastLength(positions, counted).get_seq_length()).tolist() == [5, 6, 7]


def test_the_stand_in_stores_nothing():
    key, value = torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4)
    assert PastLength(torch.arange(3)).update(key, value, 0) == (key, value)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ({("a", "position_ids", 0): (0, 1, 2)}, ("a",)),
        ({("a", "position_ids", 0): (2, 3, 4)}, ()),
        ({("a", "0", 0): (0, 1, 2)}, ()),
        ({}, ()),
    ],
)
def test_counting_modules(seen, expected):
    assert counting_modules(seen) == expected
