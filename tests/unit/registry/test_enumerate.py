# SPDX-License-Identifier: Apache-2.0
"""Stage 1: metadata of fake distributions, good and bad."""

from __future__ import annotations

import sys
import time

import pytest

from bedplate import env
from bedplate.registry.enumerate import enumerate_plugins


def codes(survey):
    return sorted(item.error.code for item in survey.diagnoses)


def filtered(text):
    return env.PLUGINS.get({"BEDPLATE_PLUGINS": text})


def test_finds_all_three_groups_and_imports_nothing(fakes):
    fakes.home("[bedplate.backends]\ncpu = fake_home:backend")
    fakes.distribution(
        "many",
        entries="""
        [bedplate.backends]
        one = fake_one:x
        [bedplate.kernels]
        two = fake_two:x
        [bedplate.plugins]
        three = fake_three.sub:x.y
        [console_scripts]
        other = fake_four:x
        """,
    )
    before = set(sys.modules)
    survey = enumerate_plugins(path=fakes.path)
    assert set(sys.modules) == before
    assert [(r.kind, r.name, r.distribution, r.status) for r in survey.records] == [
        ("backend", "cpu", "bedplate", "found"),
        ("backend", "one", "many", "found"),
        ("kernels", "two", "many", "found"),
        ("plugin", "three", "many", "found"),
    ]
    assert survey.diagnoses == ()
    assert survey.home_version == "1.0"
    assert survey.known == {"cpu", "acme"}
    assert survey.absent == ("acme",)
    assert survey.installed == {"bedplate": "1.0", "many": "0.1"}


def test_fifty_plugins_within_20_ms(fakes):
    for number in range(50):
        fakes.distribution(f"dist-{number}", entries=f"[bedplate.plugins]\np{number} = m:x")
    times = []
    for _ in range(10):
        start = time.process_time()
        found = enumerate_plugins(path=fakes.path)
        times.append(time.process_time() - start)
    assert len(found.records) == 50
    assert min(times) < 0.020


def test_two_distributions_with_one_name_are_both_refused(fakes):  # HW030
    fakes.distribution("bedplate-a", entries="[bedplate.backends]\nfast = m:x")
    fakes.distribution("bedplate-b", entries="[bedplate.backends]\nfast = m:x\nother = m:x")
    survey = enumerate_plugins(path=fakes.path)
    assert [r.status for r in survey.records] == ["refused", "refused", "found"]
    error = survey.backend("fast").error
    assert error.code == "HW030"
    assert "bedplate-a 0.1" in error.message
    assert "BEDPLATE_PLUGINS=-fast@bedplate-b" in error.message


@pytest.mark.parametrize(("blocked", "left"), [("a", "bedplate-b"), ("b", "bedplate-a")])
def test_blocking_one_duplicate_frees_the_other(fakes, blocked, left):
    fakes.distribution("bedplate-a", entries="[bedplate.backends]\nfast = m:x")
    fakes.distribution("bedplate-b", entries="[bedplate.backends]\nfast = m:x")
    survey = enumerate_plugins(filtered(f"-fast@bedplate_{blocked.upper()}"), path=fakes.path)
    assert survey.backend("fast").distribution == left
    assert survey.backend("fast").status == "found"


def test_same_name_in_two_groups_is_no_duplicate(fakes):
    fakes.distribution("d", entries="[bedplate.backends]\nx = m:b\n[bedplate.kernels]\nx = m:k")
    assert codes(enumerate_plugins(path=fakes.path)) == []


@pytest.mark.parametrize("name", ["auto", "none", "all", "cpu", "acme", "observer", "dev"])
def test_reserved_names_belong_to_bedplate(fakes, name):  # HW031
    fakes.home("[bedplate.backends]\ncpu = m:x\n[bedplate.plugins]\nobserver = m:y")
    fakes.distribution("thief", entries=f"[bedplate.backends]\n{name} = m:x")
    survey = enumerate_plugins(path=fakes.path)
    stolen = next(r for r in survey.records if r.distribution == "thief")
    assert stolen.error.code == "HW031"
    assert "thief 0.1" in stolen.error.message
    if name == "cpu":
        assert survey.backend("cpu").distribution == "bedplate"


def test_not_even_bedplate_provides_auto(fakes):
    fakes.home("[bedplate.backends]\nauto = m:x")
    assert codes(enumerate_plugins(path=fakes.path)) == ["HW031"]


def test_shadowed_metadata_is_reported_and_the_first_kept(fakes, tmp_path):  # HW032
    old = tmp_path / "old"
    fakes.distribution(
        "bedplate", version="0.0.1", entries="[bedplate.backends]\nghost = m:x", root=old
    )
    fakes.home("[bedplate.backends]\ncpu = m:x")
    survey = enumerate_plugins(path=[str(old), *fakes.path])
    assert [r.name for r in survey.records] == ["ghost"]
    (finding,) = survey.findings
    assert finding.error.code == "HW032"
    assert "0.0.1" in finding.error.message
    assert "1.0" in finding.error.message


def test_foreign_doubles_and_repeated_folders_are_no_concern(fakes, tmp_path):
    fakes.distribution("foreign", version="1")
    fakes.distribution("foreign", version="2")
    fakes.distribution("ours", entries="[bedplate.plugins]\nx = m:x")
    survey = enumerate_plugins(path=[*fakes.path, str(tmp_path / ".")])
    assert survey.findings == ()
    assert len(survey.records) == 1


def test_allow_listed_but_absent(fakes):  # HW033
    fakes.distribution("d", entries="[bedplate.plugins]\nobserver = m:x")
    survey = enumerate_plugins(filtered("observr"), path=fakes.path)
    error = next(i.error for i in survey.findings)
    assert error.code == "HW033"
    assert "Did you mean 'observer'?" in error.message


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", {"cpu", "one", "two"}),
        ("-one", {"cpu", "two"}),
        ("-one@other-dist", {"cpu", "one", "two"}),
        ("one", {"cpu", "one"}),
        ("one,two,-two", {"cpu", "one"}),
        ("none", {"cpu"}),
        ("none,-cpu", set()),
        ("-cpu", {"one", "two"}),
    ],
)
def test_filter(fakes, text, names):  # HW005
    fakes.home("[bedplate.backends]\ncpu = m:x")
    fakes.distribution("third", entries="[bedplate.backends]\none = m:x\ntwo = m:y")
    survey = enumerate_plugins(filtered(text), path=fakes.path)
    assert {r.name for r in survey.records if r.status == "found"} == names
    refused = [r for r in survey.records if r.status == "refused"]
    assert {r.error.code for r in refused} <= {"HW005"}
    assert all(r.reason for r in refused)


@pytest.mark.parametrize(
    "entry", ["Bad-Name = m:x", "9x = m:x", "ok = not a path", "ok = m:x [extra]", "ok ="]
)
def test_malformed_entry_points_are_reported_and_hide_nobody(fakes, entry):  # HW034
    fakes.distribution(
        "odd", entries=f"[bedplate.backends]\n{entry}\n[bedplate.plugins]\np=m:x"
    )
    survey = enumerate_plugins(path=fakes.path)
    assert [r.name for r in survey.records] == ["p"]
    assert codes(survey) == ["HW034"]


def test_unparsable_entry_points_are_reported(fakes):  # HW034
    fakes.distribution("odd", entries="[bedplate.backends]\nno equals sign\n")
    fakes.distribution("fine", entries="[bedplate.backends]\nok = m:x")
    survey = enumerate_plugins(path=fakes.path)
    assert [r.name for r in survey.records] == ["ok"]
    assert codes(survey) == ["HW034"]


def test_unreadable_and_nameless_distributions_hide_nobody(fakes, tmp_path):
    broken = tmp_path / "broken-1.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_bytes(b"Name: \xff\xfe\n")
    (tmp_path / "empty-1.dist-info").mkdir()
    fakes.distribution("fine", entries="[bedplate.backends]\nok = m:x")
    survey = enumerate_plugins(path=fakes.path)
    assert [r.name for r in survey.records] == ["ok"]
    assert set(survey.installed) == {"fine"}


def test_the_real_installation_offers_cpu():
    record = enumerate_plugins().backend("cpu")
    assert record.distribution == "bedplate"
    assert record.status == "found"
