# SPDX-License-Identifier: Apache-2.0
"""Wheels of this checkout, built once, and rooms to install them in."""

from __future__ import annotations

import pytest
from tests.architecture.tree import ROOT
from tests.strangers.room import Room, build_wheel


@pytest.fixture(scope="session")
def home_wheel(tmp_path_factory):
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="session")
def acme_wheel(tmp_path_factory):
    return build_wheel(ROOT / "examples" / "acme", tmp_path_factory.mktemp("wheels"))


@pytest.fixture
def room(tmp_path):
    """An empty environment in an empty folder."""
    return Room(tmp_path)


@pytest.fixture
def home(room, home_wheel):
    """A room with bedplate installed from its wheel."""
    room.install(home_wheel)
    return room
