# SPDX-License-Identifier: Apache-2.0
"""Fake distributions, in an environment that names no plugin."""

from __future__ import annotations

import pytest

from bedplate.testing.fake_plugins import fake_plugins


@pytest.fixture
def fakes(monkeypatch):
    for name in ("BEDPLATE_BACKEND", "BEDPLATE_PLUGINS", "BEDPLATE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    with fake_plugins() as made:
        yield made
