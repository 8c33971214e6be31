# SPDX-License-Identifier: Apache-2.0
"""The table of faults itself, and that each of them is triggered by some test."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

from bedplate.errors import BackendError
from bedplate.registry.faults import FAULTS, fault


def fields(entry):
    text = entry.what + entry.why + entry.next
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


@pytest.mark.parametrize("code", FAULTS)
def test_message_says_what_why_and_a_command(code):
    entry = FAULTS[code]
    assert re.fullmatch(r"HW\d{3}", code)
    assert "`" in entry.next, "a remedy holds a command in backticks"
    error = fault(code, **dict.fromkeys(fields(entry), "VALUE"))
    assert isinstance(error, BackendError)
    assert type(error) is entry.error
    assert error.code == code
    assert str(error).endswith(f"[{code}]")
    assert all(getattr(error, name) == "VALUE" for name in fields(entry))


def test_titles_are_unique():
    assert len({entry.title for entry in FAULTS.values()}) == len(FAULTS)


def test_braces_in_facts_are_harmless():
    error = fault("HW045", hook="{x}")
    assert "{x}" in str(error)


@pytest.mark.parametrize("code", FAULTS)
def test_every_code_has_a_fault_injection_test(code):
    here = Path(__file__)
    others = [path for path in here.parent.glob("test_*.py") if path != here]
    assert any(code in path.read_text() for path in others)
