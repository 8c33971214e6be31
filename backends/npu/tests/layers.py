# SPDX-License-Identifier: Apache-2.0
"""The layers of evidence: each runs pytest in a process of its own, and is counted apart.

A device belongs to a process, and torch_npu must never reach that of the other tests.
"""

from __future__ import annotations

__all__ = [
    "LABELS",
    "Outcome",
    "Wheel",
    "environment",
    "on_simulated_device",
    "outcomes",
    "run",
    "simulated_site",
]

import os
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
import zipfile
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SUITE = "backends/npu/tests/suite"
LABELS = {
    "A": "schema-checked",
    "B": "simulated-device",
    "C": "shape-checked (real torch_npu, no device)",
    "D": "simulated-runtime (real torch_npu, simulated CANN)",
}
"""Layer → what its tests show; none says that an NPU passed."""
RELEASE = "2.13.0"

outcomes: list[Outcome] = []
"""Of this session, for the summary."""


@dataclass
class Outcome:
    """What one process did.

    Attributes:
        layer: One of ``LABELS``.
        note: Schedule and the like.
        passed, failed: Counts of tests.
        caught: Mistake → what noticed it.
        text: Everything that was printed.
    """

    layer: str
    note: str
    passed: int = 0
    failed: int = 0
    caught: dict[str, str] = field(default_factory=dict)
    text: str = ""


class Wheel:
    """The wheel of torch_npu, unpacked, if this machine can use it.

    Attributes:
        problem: Why it cannot; empty if it can.
        path: The wheel.
    """

    def __init__(self) -> None:
        named = os.environ.get("TORCH_NPU_WHEEL")
        places = [Path(named)] if named else sorted(ROOT.glob(".cache/torch_npu/*.whl"))
        self.path = places[0] if places else None
        self.problem = self._problem()

    def _problem(self) -> str:
        python = f"cp{sys.version_info.major}{sys.version_info.minor}"
        if self.path is None or not self.path.is_file():
            return (
                f"no wheel of torch_npu {RELEASE}: set TORCH_NPU_WHEEL, or run `pip download "
                f"--no-deps -d .cache/torch_npu torch_npu=={RELEASE}`"
            )
        if f"-{RELEASE}-{python}-" not in self.path.name:
            return f"{self.path.name} is not torch_npu {RELEASE} for {python}"
        if "x86_64" not in self.path.name or "x86_64" not in sysconfig.get_platform():
            return "the entry points of the simulated runtime are written for x86_64"
        torch = metadata.version("torch")
        if not torch.startswith(RELEASE) or "+cu" in torch:
            return f"torch_npu {RELEASE} needs the CPU build of torch {RELEASE}, not {torch}"
        missing = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
        return f"there is no {' and no '.join(missing)}" if missing else ""

    def unpack(self, target: Path) -> Path:
        """Unpack without installing: installed, it makes every ``import torch`` fail."""
        assert self.path is not None
        with zipfile.ZipFile(self.path) as archive:
            archive.extractall(target)
        return target


def simulated_site(target: Path) -> Path:
    """A folder in which the simulated device of layer B is an installed torch_npu."""
    info = target / f"torch_npu-{RELEASE}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {RELEASE}\nRequires-Dist: torch\n"
    )
    (target / "torch_npu.py").write_text(
        "from backends.npu.tests.simulated.device import install\n\n\n"
        "def npu_fusion_attention(*_args, **_kwargs):\n"
        '    raise NotImplementedError("not simulated")\n\n\n'
        "install()\n"
    )
    for name in ("libascendcl.so", "libhccl.so"):
        (target / name).touch()
    return target


def on_simulated_device(site: Path) -> dict[str, str]:
    """Variables under which the device of ``simulated_site`` is found."""
    return {"LD_LIBRARY_PATH": str(site), "ASCEND_SIMULATED_RUNTIME": "Python device"}


def environment(paths: list[Path], **variables: str) -> dict[str, str]:
    """Variables of a process with a device of its own, and no plugin of strangers.

    Args:
        paths: What goes before everything else on the path of imports.
        variables: Set last.
    """
    own = ("core", "kernels", "backends/cpu", "backends/cuda", "backends/npu")
    places = [*paths, ROOT, *(ROOT / folder for folder in own)]
    ours = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "1",
        "BEDPLATE_PLUGINS": "none",
    }
    for name in ("ASCEND_LAUNCH_BLOCKING", "TASK_QUEUE_ENABLE", "PYTEST_ADDOPTS"):
        ours.pop(name, None)
    return ours | variables


def run(
    layer: str,
    note: str,
    tests: list[str],
    report: Path,
    *,
    paths: list[Path],
    **variables: str,
) -> Outcome:
    """Run tests in a process of their own; a layer that breaks off counts as failed.

    Args:
        layer: One of ``LABELS``.
        note: For the summary.
        tests: Arguments of pytest.
        report: Where its report goes.
        paths: What goes before everything else on the path of imports.
        variables: Of the environment.
    """
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "pytest", "-q", "-p", "no:cacheprovider",
         f"--junitxml={report}", "-o", "junit_family=xunit1", *tests],
        cwd=ROOT, env=environment(paths, **variables), check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    outcome = Outcome(layer, note, text=done.stdout)
    if report.is_file():
        for case in ElementTree.parse(report).iter("testcase"):
            bad = case.find("failure") is not None or case.find("error") is not None
            outcome.failed += bad
            outcome.passed += not bad and case.find("skipped") is None
            for item in case.iter("property"):
                if item.get("name") == "caught":
                    outcome.caught[case.get("name", "")] = item.get("value", "")
    if done.returncode and not outcome.failed:
        outcome.failed = 1
    outcomes.append(outcome)
    return outcome
