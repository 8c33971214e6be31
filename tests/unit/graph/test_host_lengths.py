# SPDX-License-Identifier: Apache-2.0
"""Host lengths of update-style graphs: vector V21."""

from __future__ import annotations

import pytest
import torch

from bedplate.errors import ReplayError
from bedplate.graph.host_lengths import padded_host_lengths


@pytest.mark.parametrize(("drafts", "expected"), [(0, [9, 4, 7, 0]), (4, [13, 8, 11, 0])])
def test_real_lengths_then_zeros(drafts, expected):
    """V21."""
    assert padded_host_lengths([9, 4, 7], 4, draft_tokens=drafts) == expected


def test_a_host_tensor_becomes_plain_integers():
    got = padded_host_lengths(torch.tensor([3, 2], dtype=torch.int32), 2)
    assert got == [3, 2]
    assert {type(n) for n in got} == {int}


def test_more_requests_than_the_graph_holds_is_refused():
    with pytest.raises(ReplayError, match=r"3 requests .* captured for 2"):
        padded_host_lengths([1, 1, 1], 2)
