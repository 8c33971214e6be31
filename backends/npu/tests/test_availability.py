# SPDX-License-Identifier: Apache-2.0
"""Every refusal that can be made without a device, with its cause and its remedy."""

from __future__ import annotations

import pytest

from bedplate.contract import ProbeRequest
from bedplate_npu import availability
from bedplate_npu.availability import Installed
from bedplate_npu.plugin import backend

GOOD = Installed(
    torch="2.13.0+cpu", cuda=False, torch_npu="2.13.0", wanted_torch="torch==2.13.0.*"
)


def changed(**values):
    return Installed(**{name: values.get(name, getattr(GOOD, name)) for name in GOOD.__slots__})


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with everything; what a test takes away is what is missing."""
    (tmp_path / "dev").mkdir()
    for number in range(2):
        (tmp_path / f"dev/davinci{number}").touch()
    (tmp_path / "dev/davinci_manager").touch()
    toolkit = tmp_path / "usr/local/Ascend"
    (toolkit / "ascend-toolkit").mkdir(parents=True)
    (toolkit / "ascend-toolkit/set_env.sh").touch()
    (toolkit / "driver").mkdir()
    (toolkit / "driver/version.info").write_text("package=driver\nVersion=25.5.0\n")
    (tmp_path / "lib").mkdir()
    for name in ("libascendcl.so", "libhccl.so"):
        (tmp_path / "lib" / name).touch()
    monkeypatch.setattr(availability, "installed", lambda: GOOD)
    return tmp_path


def probe(machine, **environment):
    given = {"LD_LIBRARY_PATH": str(machine / "lib")} | environment
    return availability.probe(given, root=machine)


def test_a_whole_machine_is_usable(machine):
    answer = probe(machine)
    assert answer.score > 500
    assert [device.name for device in answer.devices] == ["NPU 0", "NPU 1"]
    assert answer.facts["driver"] == "25.5.0"
    assert answer.facts["evidence"] == availability.EVIDENCE


@pytest.mark.parametrize(
    ("setting", "names"),
    [("1", ["NPU 1"]), ("1,0", ["NPU 1", "NPU 0"]), ("0-1", ["NPU 0", "NPU 1"]), ("7", [])],
)
def test_visible_devices_are_obeyed(machine, setting, names):
    found = availability.devices({"ASCEND_RT_VISIBLE_DEVICES": setting}, machine)
    assert list(found) == names


PROBLEMS = [
    ({"torch_npu": "", "wanted_torch": ""}, "HW010", ["torch_npu is not installed. Install"]),
    (
        {"cuda": True, "torch": "2.13.0+cu130"},
        "HW011",
        ["built for CUDA", "CPU build of torch"],
    ),
    ({"torch": "2.12.0"}, "HW011", ["made for torch ==2.13.0.*", "torch 2.12.0 is installed"]),
]


@pytest.mark.parametrize(("versions", "code", "parts"), PROBLEMS)
def test_versions_that_do_not_fit(machine, monkeypatch, versions, code, parts):
    monkeypatch.setattr(availability, "installed", lambda: changed(**versions))
    answer = probe(machine)
    assert (answer.score, answer.code) == (0, code)
    assert all(part in answer.reasons[0] for part in parts)
    assert answer.present


def test_libraries_whose_script_was_not_sourced(machine):
    (reason,) = probe(machine, LD_LIBRARY_PATH="").reasons
    assert "environment script was not sourced" in reason
    assert "set_env.sh" in reason


def test_libraries_that_are_not_there(machine):
    (machine / "usr/local/Ascend/ascend-toolkit/set_env.sh").unlink()
    (machine / "lib/libhccl.so").unlink()
    (reason,) = probe(machine).reasons
    assert reason.startswith("libhccl.so cannot be found: CANN is not installed")


def test_no_device_and_hidden_devices(machine):
    hidden = probe(machine, ASCEND_RT_VISIBLE_DEVICES="9")
    assert "ASCEND_RT_VISIBLE_DEVICES=9 hides every device" in hidden.reasons[0]
    for node in (machine / "dev").glob("davinci?"):
        node.unlink()
    answer = probe(machine)
    assert "no device node /dev/davinci*" in answer.reasons[0]
    assert not answer.present


def test_a_simulated_runtime_says_so(machine):
    for node in (machine / "dev").glob("davinci?"):
        node.unlink()
    answer = probe(machine, ASCEND_SIMULATED_RUNTIME="CANN")
    assert answer.devices[0].name == "simulated device (CANN)"


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({}, []),
        ({"TASK_QUEUE_ENABLE": "1"}, []),
        ({"TASK_QUEUE_ENABLE": "2"}, ["TASK_QUEUE_ENABLE=2", "--no-graphs"]),
        ({"ASCEND_LAUNCH_BLOCKING": "0"}, []),
        ({"ASCEND_LAUNCH_BLOCKING": "1"}, ["ASCEND_LAUNCH_BLOCKING", "Unset it"]),
    ],
)
def test_variables_that_forbid_graphs(environment, parts):
    problem = availability.graph_problem(environment)
    assert bool(problem) == bool(parts)
    assert all(part in problem for part in parts)


@pytest.mark.parametrize(
    ("version", "family", "usable"),
    [(102, "910a", False), (202, "310p", False), (220, "a2", True), (225, "a2", True),
     (240, "310b", False), (250, "a3", True), (260, "950", True), (999, "unknown 999", False)],
)  # fmt: skip
def test_families(version, family, usable):
    assert availability.soc_family(version) == family
    problem = availability.soc_problem(family)
    assert (problem == "") == usable
    assert usable or ("usable are" in problem and family in problem)


def test_versions_are_read_from_metadata(tmp_path):
    for name, version, extra in (
        ("torch", "2.13.0", ""),
        ("torch_npu", "2.13.0", "Requires-Dist: numpy\nRequires-Dist: torch==2.13.0.*\n"),
    ):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{extra}"
        )
    found = availability.installed([str(tmp_path)])
    assert found == changed(torch="2.13.0")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/version.py").write_text("cuda: str | None = '13.0'\n")
    assert availability.installed([str(tmp_path)]).cuda
    assert availability.installed([str(tmp_path / "torch")]) == Installed(
        torch="", cuda=False, torch_npu="", wanted_torch=""
    )


def test_doctor_says_everything_without_a_device(monkeypatch):
    for name in ("TASK_QUEUE_ENABLE", "ASCEND_SIMULATED_RUNTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    lines = {item.name: item for item in backend.bedplate_environment_report()}
    assert list(lines) == [
        "evidence", "torch_npu", "CANN", "driver", "devices", "graphs", "runtime"
    ]  # fmt: skip
    assert lines["evidence"].value == "schema-checked and simulated; not yet run on silicon"
    assert lines["CANN"].status == "warn"
    assert "set_env.sh" in lines["CANN"].remedy
    assert lines["graphs"].status == "ok"
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    monkeypatch.setenv("ASCEND_SIMULATED_RUNTIME", "CANN")
    lines = {item.name: item for item in backend.bedplate_environment_report()}
    assert "TASK_QUEUE_ENABLE=2" in lines["graphs"].remedy
    assert "no timing counts" in lines["runtime"].remedy


def test_the_probe_needs_nothing():
    assert backend.bedplate_probe(ProbeRequest(environment={})).score == 0
