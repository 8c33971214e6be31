# SPDX-License-Identifier: Apache-2.0
"""Layers B, C and D: the suite of the device on what stands in for one."""

from __future__ import annotations

import json
import subprocess

import pytest
from backends.npu.tests.layers import (
    ROOT,
    SUITE,
    Wheel,
    on_simulated_device,
    run,
    simulated_site,
)

LEAST_COVERAGE = 90.0
SEEDED = 20
HOST = ("backends/npu/tests/test_plugin.py", "backends/npu/tests/test_availability.py")
"""Tests of what is said before a device is taken."""
WHEEL = Wheel()
needs_wheel = pytest.mark.skipif(bool(WHEEL.problem), reason=WHEEL.problem or "usable")
SCHEDULES = [
    (schedule, queue) for queue in "01" for schedule in ("eager", "lazy", "random", "thread")
    if (schedule, queue) != ("eager", "1")  # its thread would wait for the interpreter's lock
]  # fmt: skip
QUICK = (
    "(engine and llama and generates or graph or race or update or capture or limits) "
    "and not by_name"
)
"""Tests of the suite that the default run has on the simulated runtime."""


def succeeded(outcome, least):
    assert outcome.failed == 0, outcome.text[-6000:]
    assert outcome.passed >= least, outcome.text[-3000:]


def on_device(tmp_path, tests):
    site = simulated_site(tmp_path / "site")
    return run(
        "B", "", ["-m", "npu_silicon or not npu_silicon", *tests], tmp_path / "report.xml",
        paths=[site], COVERAGE_FILE=str(tmp_path / "coverage"), **on_simulated_device(site),
    )  # fmt: skip


def test_simulated_device(tmp_path):
    """Layer B: mistakes, and models from prompts to recorded decode."""
    tests = [f"{SUITE}/test_mistakes.py", f"{SUITE}/test_engine.py", "-k", "not qwen3"]
    outcome = on_device(tmp_path, tests)
    succeeded(outcome, 35)
    assert len(outcome.caught) >= SEEDED
    assert all(outcome.caught.values())


def test_simulated_device_alone(tmp_path):
    """Layer B: what no other device can show, and that the kit notices mistakes."""
    outcome = on_device(tmp_path, ["backends/npu/tests/layer_b"])
    succeeded(outcome, 18)
    assert all(outcome.caught.values())


def test_simulated_device_with_coverage(tmp_path):
    """Layer B: the backend's lines, by files that run on hardware too."""
    cover = tmp_path / "coverage.json"
    tests = [f"{SUITE}/test_attention.py", f"{SUITE}/test_graph.py", *HOST]
    tests += ["--cov=bedplate_npu", f"--cov-report=json:{cover}", "--cov-config=/dev/null"]
    succeeded(on_device(tmp_path, tests), 100)
    covered = json.loads(cover.read_text())
    lines = {name: f["summary"]["percent_covered"] for name, f in covered["files"].items()}
    print(f"{covered['totals']['percent_covered']:.1f} % of the lines of bedplate_npu")
    assert covered["totals"]["percent_covered"] >= LEAST_COVERAGE, lines


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return WHEEL.unpack(tmp_path_factory.mktemp("wheel"))


def libraries(wheel, target, **options):
    """Libraries of CANN in ``target``; what the compiler says if it fails."""
    from backends.npu.tests.simulated.runtime.build import build

    target.mkdir()
    try:
        build(wheel, target, **options)
    except subprocess.CalledProcessError as error:
        pytest.fail(f"{error.cmd[0]}: {error.stderr}")
    return target


@needs_wheel
def test_shapes(wheel, tmp_path):
    """Layer C."""
    stubs = libraries(wheel, tmp_path / "stubs", inert=True)
    outcome = run(
        "C", "", ["-m", "npu_wheel", "backends/npu/tests/wheel"], tmp_path / "report.xml",
        paths=[wheel], LD_LIBRARY_PATH=str(stubs), STUBS=str(stubs),
    )  # fmt: skip
    succeeded(outcome, 20)


@pytest.fixture(scope="module")
def runtime(wheel, tmp_path_factory):
    return libraries(wheel, tmp_path_factory.mktemp("cann") / "lib")


def simulated(wheel, runtime, tmp_path, tests, note="", **variables):
    given = {
        "LD_LIBRARY_PATH": str(runtime), "SIM_LIBRARY": str(runtime / "libascendcl.so"),
        "ASCEND_SIMULATED_RUNTIME": "CANN", "SIM_SCHEDULE": "lazy", "TASK_QUEUE_ENABLE": "1",
    }  # fmt: skip
    return run(
        "D", note, ["-p", "backends.npu.tests.simulated.runtime.plugin", *tests],
        tmp_path / "report.xml", paths=[wheel], **(given | variables),
    )  # fmt: skip


@needs_wheel
def test_simulated_runtime(wheel, runtime, tmp_path):
    """Layer D in its nastiest order and the queue that is the default of torch_npu."""
    tests = ["-m", "npu_silicon", "-k", QUICK, SUITE, "backends/npu/tests/limits"]
    succeeded(simulated(wheel, runtime, tmp_path, tests), 20)


@needs_wheel
@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "queue"), SCHEDULES)
def test_every_schedule(wheel, runtime, tmp_path, schedule, queue):
    """Layer D, everything; in `eager` nothing is ever under way, so no race can be seen."""
    tests = ["-m", "npu_silicon", SUITE, "backends/npu/tests/limits"]
    tests += ["-k", "not race"] if schedule == "eager" else []
    outcome = simulated(
        wheel, runtime, tmp_path, tests, note=f"{schedule}, queue {queue}",
        SIM_SCHEDULE=schedule, TASK_QUEUE_ENABLE=queue,
    )  # fmt: skip
    succeeded(outcome, 60)


@needs_wheel
@pytest.mark.slow
@pytest.mark.parametrize("soc", ["Ascend910B3", "Ascend910_9391", "Ascend950PR_9599"])
def test_every_usable_soc(wheel, runtime, tmp_path, soc):
    """A2, A3 and 950: attention and graphs."""
    tests = ["-m", "npu_silicon", f"{SUITE}/test_attention.py", f"{SUITE}/test_graph.py"]
    succeeded(simulated(wheel, runtime, tmp_path, tests, note=soc, SIM_SOC=soc), 25)


def test_the_suite_is_not_in_the_default_run():
    found = subprocess.run(
        ["grep", "-rL", "pytestmark = pytest.mark.npu_silicon", SUITE,
         "backends/npu/tests/layer_b", "--include=test_*.py"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.stdout == ""


def test_the_page_lists_every_seeded_mistake():
    from backends.npu.tests.suite.test_mistakes import INSIDE, MISTAKES

    page = (ROOT / "docs/reference/npu.md").read_text(encoding="utf-8")
    assert len(MISTAKES) + len(INSIDE) >= SEEDED
    assert [name for name in (*MISTAKES, *INSIDE) if f"| {name}" not in page] == []
