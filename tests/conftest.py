# SPDX-License-Identifier: Apache-2.0
"""Rules for every test: no network, fixed seeds, no deadlines on shared machines."""

from __future__ import annotations

import os
import random
import socket
import sys

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
for _name in [name for name in os.environ if name.startswith("BEDPLATE_")]:
    del os.environ[_name]  # what a developer has set must not change what is tested

settings.register_profile("bedplate", deadline=None, print_blob=True)
settings.load_profile("bedplate")


@pytest.fixture(autouse=True)
def fixed_seeds():
    """The same numbers in every run, whatever ran before."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A connection to anywhere but this process's own machine is a failure."""
    connect = socket.socket.connect

    def guarded(self, address):
        local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        assert local, f"a test wants the network: {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
