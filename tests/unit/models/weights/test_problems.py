# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from bedplate.models.weights.problems import Problems, fold_names


def test_runs_of_layers_are_one_line():
    names = [f"m.{n}.w" for n in (0, 1, 2, 4, 7, 8)] + ["m.3.b", "head"]
    assert fold_names(names) == ["m.{0-2,4,7-8}.w", "m.3.b", "head"]


@given(st.lists(st.integers(0, 40), unique=True), st.booleans())
def test_folding_loses_no_name(numbers, other):
    names = [f"a.{n}.w" for n in numbers] + (["x.y"] if other else [])
    unfolded = []
    for line in fold_names(names):
        match = re.fullmatch(r"a\.\{?([\d,-]+)\}?\.w", line)
        for span in match[1].split(",") if match else ():
            first, _, last = span.partition("-")
            unfolded += [f"a.{n}.w" for n in range(int(first), int(last or first) + 1)]
        unfolded += [] if match else [line]
    assert sorted(unfolded) == sorted(names)


def test_no_problems_are_false():
    assert not Problems()
    assert Problems(missing=["a"])
