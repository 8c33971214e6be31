# SPDX-License-Identifier: Apache-2.0
"""Stage 3: honest, broken, slow and greedy probes."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest


def test_probe_reads_the_environment_it_is_given(fakes):
    fakes.backend("acme", probe="score=int(request.environment['SCORE'])")
    record = fakes.probed({"SCORE": "700"}).backend("acme")
    assert record.usable
    assert record.score == 700


@pytest.mark.parametrize("code", ["HW010", "HW011", "HW012"])
def test_unusable_here(fakes, code):  # HW010, HW011, HW012
    fakes.backend(
        "acme", manifest="remedy='Install the driver.'",
        probe=f"score=0, code='{code}', reasons=('no driver.', 'no node'), facts={{'a': 'b'}}",
    )  # fmt: skip
    survey = fakes.probed()
    record = survey.backend("acme")
    assert (record.usable, record.score, record.error.code) == (False, 0, code)
    assert record.reason == "no driver; no node"
    for part in ("Install the driver.", "a b", "`bedplate doctor --backend acme`"):
        assert part in record.error.message
    assert [d.severity for d in survey.diagnoses] == ["note"]


def test_present_but_unusable_deserves_a_warning(fakes):
    fakes.backend("acme", probe="score=0, reasons=('x',), present=True")
    assert [d.severity for d in fakes.probed().diagnoses] == ["warn"]


@pytest.mark.parametrize(
    ("probe", "code", "text"),
    [
        ("1/0", "HW041", "ZeroDivisionError"),
        ("raise SystemExit(1)", "HW041", "SystemExit"),
        ("raise OSError('undefined symbol: x')", "HW021", "undefined symbol"),
        ("return 5", "HW044", "gave int"),
        ("return ProbeResult(score=1000)", "HW044", "score 1000"),
        ("return ProbeResult(score=-1)", "HW044", "score -1"),
        ("return ProbeResult(score=0)", "HW044", "without a reason"),
        ("return ProbeResult(score=0, reasons=('x',), code='HW999')", "HW044", "HW999"),
    ],
)
def test_broken_probe_hides_nobody(fakes, probe, code, text):  # HW041, HW044
    fakes.backend("acme", extra=f"@hookimpl\ndef bedplate_probe(self, request): {probe}")
    fakes.backend("zgood")
    survey = fakes.probed()
    record = survey.backend("acme")
    assert (record.status, record.error.code) == ("failed", code)
    assert text in record.error.message
    assert survey.backend("zgood").usable


def test_time_limit(fakes):  # HW041
    fakes.backend(
        "slow", extra="@hookimpl\ndef bedplate_probe(self): import time; time.sleep(2)"
    )
    start = time.perf_counter()
    record = fakes.probed(limit_s=0.05).backend("slow")
    assert time.perf_counter() - start < 1.5
    assert record.error.code == "HW041"
    assert "no answer within 0.05 s" in record.error.message


@pytest.mark.parametrize(
    "probe", ["1/0", "return 5", "return ProbeResult(score=0, reasons='x')"]
)
def test_missing_requirement_explains_what_follows(fakes, probe):
    fakes.backend(
        "acme", manifest="requires=('absent',)",
        extra=f"@hookimpl\ndef bedplate_probe(self): {probe}",
    )  # fmt: skip
    assert fakes.probed().backend("acme").error.code == "HW002"


def test_only_the_named_are_asked(fakes):
    fakes.backend("one")
    fakes.backend("two")
    survey = fakes.probed(names=["one"])
    assert survey.backend("one").probe is not None
    assert survey.backend("two").probe is None
    assert not survey.backend("two").usable


def _torch(state):
    return SimpleNamespace(
        accelerator=SimpleNamespace(current_accelerator=lambda: SimpleNamespace(type="x")),
        get_device_module=lambda _name: SimpleNamespace(is_initialized=lambda: state["on"]),
    )


@pytest.mark.parametrize("before", [False, True])
def test_context_created_by_a_probe(fakes, monkeypatch, before):  # HW043
    state = {"on": before}
    monkeypatch.setitem(sys.modules, "torch", _torch(state))
    monkeypatch.setitem(sys.modules, "fake_state", SimpleNamespace(state=state))
    fakes.backend(
        "greedy",
        extra="@hookimpl\ndef bedplate_probe(self):\n"
        "    import fake_state; fake_state.state['on'] = True\n"
        "    return ProbeResult(score=50)",
    )
    record = fakes.probed().backend("greedy")
    assert record.usable
    assert [w.code for w in record.warnings] == ([] if before else ["HW043"])
