# SPDX-License-Identifier: Apache-2.0
"""The probe on machines that are drawn as folders."""

from __future__ import annotations

import pytest

from bedplate_rocm.driver import (
    Gpu,
    TorchBuild,
    driver_version,
    gpus,
    probe,
    torch_build,
    visible,
)

ROCM = TorchBuild(version="2.11.0+rocm7.1")
CUDA = TorchBuild(version="2.11.0+cu130", problem="torch 2.11.0+cu130 is built for CUDA")
PROPERTIES = (
    "cpu_cores_count 0\nsimd_count 1216\ngfx_target_version {version}\n"
    "unique_id {unique}\ndrm_render_minor {minor}\n"
)


@pytest.fixture
def machine(tmp_path):
    """Draws the door, render nodes, and the topology: (version, render minor, product)."""

    def draw(nodes=(), renders=None, door=True, module="6.10.5\n"):
        render = tmp_path / "dev/dri"
        render.mkdir(parents=True)
        if door:
            (tmp_path / "dev/kfd").touch()
        topology = tmp_path / "sys/class/kfd/kfd/topology/nodes"
        host = topology / "0"
        host.mkdir(parents=True)
        (host / "properties").write_text("cpu_cores_count 96\ngfx_target_version 0\n")
        for place, (version, minor, product) in enumerate(nodes, start=1):
            folder = topology / str(place)
            folder.mkdir()
            text = PROPERTIES.format(version=version, unique=255 + place, minor=minor)
            (folder / "properties").write_text(text)
            if renders is None or minor in renders:
                (render / f"renderD{minor}").touch()
            if product:
                device = tmp_path / f"sys/class/drm/renderD{minor}/device"
                device.mkdir(parents=True)
                (device / "product_name").write_text(product + "\n")
        if module is not None:
            (tmp_path / "sys/module/amdgpu").mkdir(parents=True)
        if module:
            (tmp_path / "sys/module/amdgpu/version").write_text(module)
        return tmp_path

    return draw


TWO = {"nodes": ((90402, 128, "AMD Instinct MI300X"), (110000, 136, ""))}
BARE = {"nodes": (), "door": False, "module": None}


def ask(root, environment=None, build=ROCM, openable=True):
    return probe(environment or {}, root=root, build=build, can_open=lambda _node: openable)


@pytest.mark.parametrize(
    ("drawn", "environment", "archs"),
    [
        (TWO, {}, ["gfx942", "gfx1100"]),
        (TWO, {"HIP_VISIBLE_DEVICES": "1"}, ["gfx1100"]),
        (TWO, {"ROCR_VISIBLE_DEVICES": "1,0", "HIP_VISIBLE_DEVICES": "0"}, ["gfx1100"]),
        (TWO, {"CUDA_VISIBLE_DEVICES": "1, 0"}, ["gfx1100", "gfx942"]),
        (TWO, {"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, ["gfx942"]),
        (TWO, {"ROCR_VISIBLE_DEVICES": "GPU-0000000000000101"}, ["gfx1100"]),
        (TWO, {"HIP_VISIBLE_DEVICES": "0,7,1"}, ["gfx942"]),
        ({**TWO, "renders": (136,)}, {}, ["gfx1100"]),
        ({"nodes": ((90010, 128, ""), (120001, 129, ""))}, {}, ["gfx90a", "gfx1201"]),
    ],
)
def test_usable(machine, drawn, environment, archs):
    result = ask(machine(**drawn), environment)
    assert (result.score, result.reasons) == (800, ())
    assert [device.arch for device in result.devices] == archs
    assert [device.index for device in result.devices] == list(range(len(archs)))


def test_names_of_devices(machine):
    first, second = gpus(machine(**TWO))
    assert first == Gpu(arch="gfx942", name="AMD Instinct MI300X", uuid="GPU-0000000000000100")
    assert second.name == "AMD Radeon RX 7900, PRO W7900 (gfx1100)"


@pytest.mark.parametrize(
    ("drawn", "options", "code", "present", "reason"),
    [
        (BARE, {}, "HW010", False, "no AMD driver"),
        (BARE, {"build": CUDA}, "HW010", False, "no AMD driver"),
        ({**TWO, "renders": ()}, {}, "HW010", False, "no device node /dev/dri"),
        (TWO, {"environment": {"HIP_VISIBLE_DEVICES": ""}}, "HW010", False,
         "HIP_VISIBLE_DEVICES= hides every"),
        (TWO, {"environment": {"ROCR_VISIBLE_DEVICES": "-1"}}, "HW010", False, "=-1 hides"),
        (TWO, {"openable": False}, "HW010", True, "groups of /dev/kfd"),
        (TWO, {"build": CUDA}, "HW011", True, "built for CUDA"),
        ({"nodes": ((90008, 128, "MI100"), (100300, 129, ""))}, {}, "HW012", True,
         "no kernel is compiled for gfx1030, gfx908; there are gfx90a"),
    ],
)  # fmt: skip
def test_unusable(machine, drawn, options, code, present, reason):
    result = ask(machine(**drawn), **options)
    assert (result.score, result.code, result.present) == (0, code, present)
    assert reason in result.reasons[0]


def test_one_known_device_is_enough(machine):
    root = machine(nodes=((100300, 128, ""), (90402, 129, "")))
    assert [device.arch for device in ask(root).devices] == ["gfx1030", "gfx942"]


@pytest.mark.parametrize(
    ("module", "version"), [("6.10.5\n", "6.10.5"), ("", "in the kernel"), (None, "")]
)
def test_version_of_the_driver(machine, module, version):
    assert driver_version(machine(module=module)) == version


def test_nothing_is_visible_of_nothing():
    assert visible((), {}) == visible((), {"HIP_VISIBLE_DEVICES": "0,1"}) == ()


@pytest.mark.parametrize(
    ("version", "text", "triton", "problem"),
    [
        ("2.11.0+rocm7.1", None, True, ""),
        ("2.11.0", "hip: Optional[str] = '7.1.25424'", True, ""),
        ("2.11.0a0+git123", "hip = '7.0'\ncuda = None", True, ""),
        ("2.11.0+rocm7.1", None, False, "Triton that belongs to this torch is missing"),
        ("2.11.0+cu130", "cuda = '13.0'\nhip: Optional[str] = None", True,
         "built for CUDA and not for ROCm"),
        ("2.11.0+cpu", "hip = None", True, "built for the processor and not for ROCm"),
        ("2.11.0", "hip = None", True, "built for another device and not for ROCm"),
    ],
)  # fmt: skip
def test_build_of_torch(tmp_path, version, text, triton, problem):
    head = tmp_path / f"torch-{version}.dist-info"
    head.mkdir()
    (head / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    if text is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "version.py").write_text(f"debug = False\n{text}\n")
    if triton:
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton/__init__.py").touch()
    build = torch_build([str(tmp_path)])
    assert build.version == version
    assert problem in build.problem
    assert bool(problem) == bool(build.problem)


def test_no_torch_at_all(tmp_path):
    assert torch_build([str(tmp_path)]).problem == "torch is not installed"


def test_this_machine_can_be_asked():
    assert probe({}).facts.keys() == {"driver", "torch"}
