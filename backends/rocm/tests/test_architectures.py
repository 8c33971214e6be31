# SPDX-License-Identifier: Apache-2.0
"""Architectures are found by name, never by number."""

from __future__ import annotations

import pytest

from bedplate_rocm.architectures import ARCHITECTURES, arch_word, find


@pytest.mark.parametrize(
    ("name", "word"),
    [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx1100", "gfx1100"), ("gfx90a:xnack+", "gfx90a")],
)
def test_features_of_the_name_do_not_matter(name, word):
    assert arch_word(name) == word
    assert find(name) is ARCHITECTURES[word]


@pytest.mark.parametrize("name", ["gfx908", "gfx1030", "sm_90", "", "9.4"])
def test_what_nothing_is_compiled_for_is_not_known(name):
    assert find(name) is None


@pytest.mark.parametrize(
    ("arch", "wave", "lds_kib", "slices", "narrow"),
    [
        ("gfx90a", 64, 64, 1, ()),
        ("gfx942", 64, 64, 8, ("float8_e4m3fnuz", "float8_e5m2fnuz")),
        ("gfx950", 64, 160, 8, ("float8_e4m3fn", "float8_e5m2")),
        ("gfx1100", 32, 64, 1, ()),
        ("gfx1201", 32, 64, 1, ("float8_e4m3fn", "float8_e5m2")),
    ],
)
def test_facts(arch, wave, lds_kib, slices, narrow):
    found = ARCHITECTURES[arch]
    assert (found.wave, found.lds_bytes, found.slices) == (wave, lds_kib << 10, slices)
    assert found.narrow == narrow
