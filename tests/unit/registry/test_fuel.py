# SPDX-License-Identifier: Apache-2.0
"""Kernels are counted in order, once each, and the last ones go first."""

from __future__ import annotations

import pytest

from bedplate import env
from bedplate.errors import ConfigError
from bedplate.registry.fuel import Fuel

KERNELS = ("a", "b", "a", "c", "b")


@pytest.mark.parametrize(
    ("limit", "used"),
    [(None, "abacb"), (0, ""), (1, "aa"), (2, "abab"), (3, "abacb"), (99, "abacb")],
)
def test_the_first_ones_are_used(limit, used):
    fuel = Fuel(limit)
    assert "".join(kernel for kernel in KERNELS if fuel.take(kernel)) == used


def test_a_refusal_says_how_to_undo_it():
    fuel = Fuel(0)
    assert fuel.take("a").reason == "it is kernel 1, and BEDPLATE_FUEL is 0"


def test_every_kernel_is_listed_once_allowed_or_not(tmp_path):
    file = tmp_path / "kernels"
    fuel = Fuel.from_environment({"BEDPLATE_FUEL": "1", "BEDPLATE_FUEL_FILE": str(file)})
    for kernel in KERNELS:
        fuel.take(kernel)
    assert file.read_text().split() == ["a", "b", "c"]


@pytest.mark.parametrize("text", ["-1", "two", "1.5"])
def test_other_amounts_are_refused(text):
    with pytest.raises(ConfigError, match="BEDPLATE_FUEL"):
        env.FUEL.get({"BEDPLATE_FUEL": text})
