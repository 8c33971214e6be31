# SPDX-License-Identifier: Apache-2.0
"""The probe on machines that are drawn as folders."""

from __future__ import annotations

import pytest

from bedplate_cuda.driver import (
    Gpu,
    TorchBuild,
    driver_version,
    gpus,
    probe,
    torch_build,
    visible,
)

CUDA = TorchBuild(version="2.11.0+cu130")
HOST = TorchBuild(version="2.13.0+cpu", problem="torch 2.13.0+cpu is built without CUDA")
MODULES = {
    "open": ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release "
             "Build  (dvs-builder@U22)  Tue Sep 23\nGCC version:  gcc version 12.3.0\n"),
    "closed": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15",
}  # fmt: skip
INFORMATION = "Model: \t\t {}\nIRQ:   \t\t 90\nGPU UUID: \t GPU-{}\nDevice Minor: \t {}\n"


@pytest.fixture
def machine(tmp_path):
    """Draws nodes, descriptions (bus, model, uuid, minor) and the driver's version."""

    def draw(nodes=(), described=(), module=MODULES["open"]):
        (tmp_path / "dev").mkdir()
        proc = tmp_path / "proc/driver/nvidia"
        for name in nodes:
            (tmp_path / "dev" / name).touch()
        if module or described:
            proc.mkdir(parents=True)
        if module:
            (proc / "version").write_text(module)
        for bus, model, uuid, minor in described:
            folder = proc / "gpus" / bus
            folder.mkdir(parents=True)
            (folder / "information").write_text(INFORMATION.format(model, uuid, minor))
        return tmp_path

    return draw


TWO = {
    "nodes": ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"),
    "described": (("0000:04", "H200", "aa", 1), ("0000:05", "L4", "bb", 0)),
}
BARE = {"nodes": (), "described": (), "module": ""}


@pytest.mark.parametrize(
    ("drawn", "environment", "names"),
    [
        (TWO, {}, ["H200", "L4"]),
        (TWO, {"CUDA_VISIBLE_DEVICES": "1"}, ["L4"]),
        (TWO, {"CUDA_VISIBLE_DEVICES": "1, 0"}, ["L4", "H200"]),
        (TWO, {"CUDA_VISIBLE_DEVICES": "0,7,1"}, ["H200"]),
        (TWO, {"CUDA_VISIBLE_DEVICES": "GPU-b"}, ["L4"]),
        (TWO, {"CUDA_VISIBLE_DEVICES": "MIG-x"}, ["slice MIG-x"]),
        ({**TWO, "nodes": ("nvidia1",)}, {}, ["H200"]),
        ({"nodes": ("nvidia10", "nvidia2"), "module": ""}, {},
         ["NVIDIA device 2", "NVIDIA device 10"]),
    ],
)  # fmt: skip
def test_usable(machine, drawn, environment, names):
    result = probe(environment, root=machine(**drawn), build=CUDA)
    assert (result.score, result.reasons) == (800, ())
    assert [device.name for device in result.devices] == names
    assert [device.index for device in result.devices] == list(range(len(names)))


@pytest.mark.parametrize(
    ("drawn", "environment", "build", "code", "present", "reason"),
    [
        (BARE, {}, CUDA, "HW010", False, "no NVIDIA driver"),
        (BARE, {}, HOST, "HW010", False, "no NVIDIA driver"),
        ({**TWO, "nodes": ("nvidiactl",)}, {}, CUDA, "HW010", False, "no device node"),
        (TWO, {"CUDA_VISIBLE_DEVICES": ""}, CUDA, "HW010", False, "hides every device"),
        (TWO, {"CUDA_VISIBLE_DEVICES": "-1"}, CUDA, "HW010", False, "=-1 hides every"),
        (BARE, {"CUDA_VISIBLE_DEVICES": "MIG-x"}, CUDA, "HW010", False, "no NVIDIA driver"),
        (TWO, {}, HOST, "HW011", True, "built without CUDA"),
        (TWO, {}, TorchBuild(version="", problem="torch is not installed"), "HW011", True,
         "torch is not installed"),
    ],
)  # fmt: skip
def test_unusable(machine, drawn, environment, build, code, present, reason):
    result = probe(environment, root=machine(**drawn), build=build)
    assert (result.score, result.code, result.present) == (0, code, present)
    assert reason in result.reasons[0]
    assert result.facts["torch"] == (build.version or "not installed")


@pytest.mark.parametrize(
    ("module", "version"),
    [(MODULES["open"], "580.95.05"), (MODULES["closed"], "535.183.01"), ("", "")],
)
def test_version_of_the_driver(machine, module, version):
    assert driver_version(machine(module=module)) == version


def test_unreadable_description_leaves_the_node(machine):
    root = machine(nodes=("nvidia0",))
    (root / "proc/driver/nvidia/gpus/0000:04/information").mkdir(parents=True)
    assert gpus(root) == (Gpu(name="NVIDIA device 0"),)


def test_nothing_is_visible_of_nothing():
    assert visible((), None) == visible((), "0,1") == ()


@pytest.mark.parametrize(
    ("version", "text", "problem"),
    [
        ("2.11.0+cu130", "cuda: Optional[str] = None", ""),  # the version has the word
        ("2.11.0+cpu", None, "built without CUDA"),
        ("2.11.0+rocm7.1", "cuda: Optional[str] = None", "built without CUDA"),
        ("2.11.0+xpu", None, "built without CUDA"),
        ("2.11.0", None, ""),
        ("2.11.0", "cuda: Optional[str] = '13.0'\nhip: Optional[str] = None", ""),
        ("2.11.0", "cuda: Optional[str] = None\nhip = None", "built without CUDA"),
        ("2.11.0a0+nv25.10", "cuda = '13.0'", ""),
        ("2.11.0+git123", "cuda = None", "built without CUDA"),
    ],
)
def test_build_of_torch(tmp_path, version, text, problem):
    head = tmp_path / f"torch-{version}.dist-info"
    head.mkdir()
    (head / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    if text is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "version.py").write_text(f"debug = False\n{text}\n")
    build = torch_build([str(tmp_path)])
    assert build.version == version
    assert problem in build.problem
    assert bool(problem) == bool(build.problem)


def test_no_torch_at_all(tmp_path):
    assert torch_build([str(tmp_path)]).problem == "torch is not installed"
