# SPDX-License-Identifier: Apache-2.0
"""What was built for an earlier release goes on working, unmodified."""

from __future__ import annotations

import copy
import json

import pytest
from tests.contract.compat import breaks
from tests.contract.snapshot import describe
from tests.strangers.freeze import FROZEN

RELEASES = sorted(path.name for path in FROZEN.iterdir())
WHAT_TO_DO = """
Plugins built for {release} would break:

{breaks}

Names of the contract are promises: give the old one back beside the new one, with a default
for whatever is new.  Only a major version of the contract may remove, after two minors that
warned; then say so in version.py and in a breaking fragment, and delete tests/strangers/frozen/
of the releases that no supported plugin was built for.
"""
PATCHES = """
import sys
import bedplate.engine.engine, bedplate.runner.startup, bedplate.reference.ops
def attributes():
    return {(name, key): id(value)
            for name, module in list(sys.modules.items()) if name.split(".")[0] == "bedplate"
            for key, value in list(vars(module).items()) if not key.startswith("__")}
before = attributes()
from bedplate import Engine
with Engine(backend="acme") as engine:
    text = engine.generate(["Hello"])[0].text
after = attributes()
changed = [key for key in before if after.get(key) != before[key]]
assert not changed, changed
"""


def frozen_contract(release):
    return json.loads((FROZEN / release / "contract.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("release", RELEASES)
def test_nothing_that_plugins_were_built_with_is_gone(release):
    found = breaks(frozen_contract(release), describe())
    text = WHAT_TO_DO.format(release=release, breaks="\n".join(found))
    assert found == [], text


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (("hooks",), ("bedplate_compile", None), "hook bedplate_compile is gone"),
        (
            ("hooks", "bedplate_probe"),
            ("signature", "(self) -> X"),
            "lost its argument request",
        ),
        (("public",), ("OpProvider", None), "OpProvider is gone"),
        (("public", "ProbeResult"), ("reasons", None), "ProbeResult.reasons is gone"),
        (("public", "ProbeResult"), ("power", "int"), "ProbeResult.power is new and must be"),
        (("public", "ProbeResult"), ("facts", "Mapping"), "ProbeResult.facts has lost"),
        (
            ("public", "DeviceRuntime"),
            ("ready", "(self) -> None (required)"),
            "become required",
        ),
        (("public", "DeviceRuntime"), ("nap", "(self) -> None (required)"), "is new and must"),
        (("public", "KVPool"), ("write", "(self, call_id: int, k: T, v: T)"), "argument slots"),
    ],
)
def test_every_kind_of_break_is_seen(path, change, message):
    old, new = describe(), copy.deepcopy(describe())
    place = new
    for step in path:
        place = place[step]
    name, value = change
    place.pop(name) if value is None else place.update({name: value})
    (only,) = breaks(old, new)
    assert message in only


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (("hooks",), ("bedplate_new", {"signature": "(self)", "firstresult": False})),
        (("hooks", "bedplate_probe"), ("signature", "(self, request: R, more: M) -> X")),
        (("public",), ("Newcomer", {"x": "int"})),
        (("public", "ProbeResult"), ("power", "int = 0")),
        (("public", "DeviceRuntime"), ("nap", "(self) -> None")),
    ],
)
def test_what_is_added_breaks_nobody(path, change):
    old, new = describe(), copy.deepcopy(describe())
    place = new
    for step in path:
        place = place[step]
    place.update([change])
    assert breaks(old, new) == []


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_frozen_plugins_work_unmodified(home, release, tmp_path):
    wheels = sorted((FROZEN / release).glob("*.whl"))
    assert len(wheels) >= 3
    home.install(*wheels)
    names = {wheel.name.partition("-")[0].removeprefix("bedplate_") for wheel in wheels}
    rows = {row["name"]: row for row in home.backends().values() if row["name"] in names}
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(names, "usable")
    lines = tmp_path / "lines.jsonl"
    answer = home.answer("acme", BEDPLATE_OBSERVER_FILE=str(lines))
    assert answer["text"].strip() == "12 + 30 = 42."
    events = [json.loads(line) for line in lines.read_text().splitlines()]
    points = {event.get("point") for event in events}
    assert {"pack.rms_norm_pack", "override.rms_norm", "attention", "op.rms_norm"} <= points
    assert [e["chosen"] for e in events if e.get("point") == "attention"] == ["acme"]
    assert events[-1]["event"] == "total"
    home.run("-c", PATCHES)
