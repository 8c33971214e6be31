# SPDX-License-Identifier: Apache-2.0
"""Proven sites are asked about one by one, in a fixed order, and may be left out."""

from __future__ import annotations

import pytest

from bedplate.contract import Support
from bedplate.models.fusion import fuse
from bedplate.reference.ops import rms_norm
from bedplate.testing.tiny_models import family, tiny_model


@pytest.mark.parametrize("limit", [0, 1, 9, 20, 99])
def test_the_first_ones_are_used_and_the_others_say_why_not(limit, ops):
    asked = []

    def allow(label):
        asked.append(label)
        return Support.yes() if len(asked) <= limit else Support.no("no fuel")

    plan = fuse(tiny_model(*family("llama")), ops(rms_norm=rms_norm), mode="leaf", allow=allow)
    assert len(asked) == 26
    assert len(plan.sites) == min(limit, 26)
    made = [(d.point, d.candidates[0]) for d in plan.decisions if d.point != "fusion"]
    assert [point for point, _ in made] == [label.partition(": ")[0] for label in asked]
    refused = [c for _, c in made if c.verdict == "refused"]
    assert len(refused) == 26 - len(plan.sites)
    assert {c.reason for c in refused} <= {"no fuel"}
    assert asked[8].endswith(".norm: rms_norm by kernels")
