# SPDX-License-Identifier: Apache-2.0
"""The contract changes on purpose only: hooks and public names equal the committed snapshot."""

from __future__ import annotations

import difflib
import json

from tests.contract.snapshot import FILE, text

WHAT_TO_DO = """
The contract differs from tests/contract/contract.json:

{diff}

If this was not meant, undo it. If it was:
  1. Additive (a new hook, a new field with a default, a new optional method): raise the minor
     of API_VERSION in core/bedplate/contract/version.py once per release.
     Anything else breaks plugins: raise the major, after two minors of warnings.
  2. Say so in a fragment in changelog.d/.
  3. Write the snapshot: python tests/contract/snapshot.py
"""


def test_contract_equals_its_snapshot():
    old, new = FILE.read_text(encoding="utf-8"), text()
    diff = "\n".join(difflib.unified_diff(old.splitlines(), new.splitlines(), "was", "is", n=1))
    assert old == new, WHAT_TO_DO.format(diff=diff)


def test_snapshot_covers_hooks_fields_and_required_methods():
    data = json.loads(FILE.read_text(encoding="utf-8"))
    assert data["hooks"]["bedplate_activate"] == {
        "signature": "(self, request: ActivateRequest) -> DeviceRuntime",
        "firstresult": True,
    }
    assert data["public"]["ProbeResult"]["score"] == "int"
    assert data["public"]["DeviceRuntime"]["synchronize"] == "(self) -> None (required)"
    assert len(data["hooks"]) >= 17
