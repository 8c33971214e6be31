# SPDX-License-Identifier: Apache-2.0
"""Stage 4: tables and properties of the pure choice."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bedplate.contract import BackendManifest, DeviceFacts, ProbeResult
from bedplate.errors import BackendNotFoundError, BackendUnavailableError, ConfigError
from bedplate.registry.faults import fault
from bedplate.registry.records import PluginRecord, Survey
from bedplate.registry.select import (
    BackendRequest,
    parse_request,
    score_class,
    select_backend,
)


def record(name, score=50, *, present=False, code="HW010", devices=(), status="loaded", **more):
    probe = ProbeResult(
        score=score, reasons=("broken",), present=present, **more,
        devices=tuple(DeviceFacts(index=i, name="d") for i in devices),
    )  # fmt: skip
    base = PluginRecord(
        name=name, kind="backend", distribution=f"bedplate-{name}", version="1", location="",
        entry_point=EntryPoint(name, "m:x", "bedplate.backends"), status=status, probe=probe,
        manifest=BackendManifest(name=name),
    )  # fmt: skip
    if score and code == "HW010":
        return base
    facts = dict.fromkeys(("reasons", "found", "remedy", "missing", "command", "hook", "cause",
                           "request", "explanation", "frames"), "-")  # fmt: skip
    return base.without(status, fault(code, **base.facts() | facts), f"{name} broken")


def survey(*records, known=()):
    return Survey(records=records, known=frozenset(known), home_version="1.0")


def choose(text, *records, known=(), source="--backend"):
    return select_backend(
        BackendRequest(text=text, source=source), survey(*records, known=known)
    )


def verdicts(selection):
    return [(c.name, c.verdict) for c in selection.decision.candidates]


HOST, SLOW, FAST = record("host", 50), record("slow", 200), record("fast", 800)
DEAD = record("dead", 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", []),
        (" cpu ", [("cpu", None)]),
        ("acme:1", [("acme", 1)]),
        ("a, b:2 ,c", [("a", None), ("b", 2), ("c", None)]),
    ],
)
def test_forms(text, expected):
    got = parse_request(BackendRequest(text=text))
    assert [(w.name, w.index) for w in got] == expected


@pytest.mark.parametrize(
    "text", ["", "CPU", "a,,b", "a:", "a:x", "a:-1", "auto,cpu", "none", "all", "auto:1", "a b"]
)
def test_forms_that_are_refused_name_source_and_value(text):
    with pytest.raises(ConfigError) as caught:
        parse_request(BackendRequest(text=text, source="BEDPLATE_BACKEND"))
    assert "BEDPLATE_BACKEND" in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "chosen", "expected"),
    [
        ("host", "host", [("host", "chosen"), ("fast", "refused"), ("dead", "refused")]),
        ("dead,host", "host", [("dead", "refused"), ("host", "chosen"), ("fast", "refused")]),
        ("fast,host", "fast", [("fast", "chosen"), ("host", "possible"), ("dead", "refused")]),
        ("typo,host", "host", [("typo", "refused"), ("host", "chosen"), ("fast", "refused"),
                               ("dead", "refused")]),
        ("auto", "fast", [("fast", "chosen"), ("host", "possible"), ("dead", "refused")]),
    ],
)  # fmt: skip
def test_choice(text, chosen, expected):
    selection = choose(text, HOST, FAST, DEAD)
    assert selection.error is None
    assert selection.record.name == selection.decision.chosen == chosen
    assert verdicts(selection) == expected
    assert all(c.reason and not c.reason.endswith(".") for c in selection.decision.candidates)
    assert selection.decision.detail["source"] == "--backend"


PRETENDED = record("pretended", 900, only_by_name=True)


def test_auto_never_chooses_what_runs_only_by_its_name():
    selection = choose("auto", HOST, PRETENDED)
    assert verdicts(selection) == [("pretended", "refused"), ("host", "chosen")]
    alone = choose("auto", PRETENDED)
    assert (alone.record, alone.error.code) == (None, "HW006")
    assert "pretended: runs only if it is named" in alone.error.message
    dead = record("pretended", 0, only_by_name=True)
    assert choose("auto", HOST, dead).record.name == "host"
    assert choose("pretended", HOST, PRETENDED).record.name == "pretended"


@pytest.mark.parametrize(("text", "index"), [("x", 2), ("x:3", 3), ("auto", 2)])
def test_device_index(text, index):
    assert choose(text, record("x", devices=(2, 3))).device_index == index


def test_device_index_without_facts_is_believed():
    assert choose("x:5", record("x")).device_index == 5
    assert choose("x", record("x")).device_index == 0


BROKEN = record("boom", 0, code="HW040", status="failed")


@pytest.mark.parametrize(
    ("text", "records", "code", "words"),
    [
        ("hots", (HOST,), "HW001", ["Did you mean 'host'?", "bedplate-host 1"]),
        ("hots", (), "HW001", ["Installed: none"]),
        ("needy", (record("needy", 0, code="HW002"),), "HW002", ["needy"]),
        ("future", (HOST,), "HW004", ["bedplate 1.0", "Usable here: host"]),
        ("future", (), "HW004", ["Usable here: nothing"]),
        ("x:7", (record("x", devices=(0, 1)),), "HW007", ["no device 7", "0, 1"]),
        ("dead", (DEAD, HOST), "HW010", ["dead"]),
        ("dead,boom", (DEAD, BROKEN), "HW006",
         ["dead: dead broken (HW010)", "boom: boom broken (HW040)"]),
        ("typo,dead", (DEAD,), "HW006", ["typo: no backend of that name (HW001)"]),
        ("boom", (BROKEN, HOST), "HW040", ["boom"]),
        ("auto", (), "HW006", ["nothing is installed"]),
        ("auto", (DEAD,), "HW006", ["dead: dead broken"]),
        ("auto", (record("there", 0, present=True), DEAD), "HW003", ["'there'", "dead: "]),
        ("auto", (FAST, record("quick", 800), HOST), "HW050", ["'fast' and 'quick'", "800"]),
        ("auto", (HOST, record("there", 0, present=True)), "HW051",
         ["'there' is present", "HW010", "--backend host"]),
        ("auto", (SLOW, record("there", 700, code="HW002")), "HW051", ["HW002"]),
    ],
)  # fmt: skip
def test_refusal(text, records, code, words):
    selection = choose(text, *records, known=("future",))
    assert selection.record is None
    assert selection.decision.chosen is None
    assert selection.error.code == code
    for word in words:
        assert word in selection.error.message
    assert not any(c.verdict == "chosen" for c in selection.decision.candidates)


def test_classes_of_errors():
    assert isinstance(choose("typo", HOST).error, BackendNotFoundError)
    assert isinstance(choose("future", HOST, known=("future",)).error, BackendUnavailableError)


def test_broken_import_is_failed_and_does_not_stop_auto():
    selection = choose("auto", HOST, BROKEN)
    assert selection.record is HOST
    assert ("boom", "failed") in verdicts(selection)


def test_failed_equal_class_does_not_stop_auto():
    assert choose("auto", FAST, record("there", 0, present=True)).record is FAST
    assert choose("auto", SLOW, record("t", 150, code="HW002")).record is SLOW


def test_a_refused_namesake_does_not_hide_the_real_one():
    thief = record("host", 0, code="HW031", status="refused")
    assert choose("host", thief, HOST).record is HOST


records_of = st.lists(st.tuples(st.integers(0, 999), st.booleans()), max_size=5).map(
    lambda items: [record(f"b{i}", s, present=p) for i, (s, p) in enumerate(items)]
)


@given(records_of)
def test_auto_never_downgrades_in_silence(records):
    selection = choose("auto", *records)
    assert (selection.record is None) == (selection.error is not None)
    assert sorted(c.name for c in selection.decision.candidates) == [r.name for r in records]
    if selection.record is not None:
        best = selection.record.score
        assert all(r.score < best for r in records if r is not selection.record)
        assert (
            not any(r.probe.present for r in records if not r.usable) or score_class(best) == 2
        )


@given(records_of, st.permutations(range(5)))
def test_order_of_preference_is_kept(records, order):
    names = [f"b{i}" for i in order]
    selection = choose(",".join(names), *records)
    usable = [n for n in names if any(r.name == n and r.usable for r in records)]
    assert (selection.record.name if selection.record else None) == (usable or [None])[0]
