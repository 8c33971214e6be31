# SPDX-License-Identifier: Apache-2.0
"""Whether an NPU could run here, from files, metadata and variables alone.

Probing must import neither torch nor torch_npu: without its libraries the latter makes even
``import torch`` fail, and next to a CUDA build of torch it ends the process.  So everything
that can be known beforehand is known here.  Called by ``plugin``; tests give other roots.
"""

from __future__ import annotations

__all__ = [
    "EVIDENCE",
    "SIMULATED",
    "Installed",
    "cann_problem",
    "devices",
    "driver_version",
    "graph_problem",
    "installed",
    "probe",
    "soc_family",
    "soc_problem",
    "torch_problem",
]

import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from bedplate.contract import DeviceFacts, ProbeResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EVIDENCE = "schema-checked and simulated; not yet run on silicon"
"""What is known of this backend; the label of docs, ``doctor`` and capabilities."""
SIMULATED = "ASCEND_SIMULATED_RUNTIME"
"""Variable that a simulated runtime sets to its name: there are no device nodes then, and no
timing means anything."""

_SCORE = 700
_ROOT = Path("/")
_LIBRARIES = ("libascendcl.so", "libhccl.so")
_TOOLKIT = "usr/local/Ascend"
_SYSTEM_FOLDERS = ("usr/lib", "usr/lib64", "usr/local/lib", "usr/lib/x86_64-linux-gnu",
                   "usr/lib/aarch64-linux-gnu")  # fmt: skip
_SOURCE = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"

_FAMILIES = (
    (range(100, 106), "910a"),
    (range(200, 206), "310p"),
    (range(220, 226), "a2"),
    (range(240, 243), "310b"),
    (range(250, 257), "a3"),
    (range(260, 270), "950"),
)
"""Numbers of ``torch_npu.npu.get_soc_version()`` and what the devices are called."""
_USABLE = ("a2", "a3", "950")


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """Versions of what must fit together, from metadata.

    Attributes:
        torch: Version of torch, empty when absent.
        cuda: Whether that torch is built for CUDA.
        torch_npu: Version of torch_npu, empty when absent.
        wanted_torch: Requirement on torch that torch_npu states, such as ``torch==2.13.0.*``.
    """

    torch: str
    cuda: bool
    torch_npu: str
    wanted_torch: str


def probe(environment: Mapping[str, str], *, root: Path = _ROOT) -> ProbeResult:
    """Whether an NPU could run here.

    Args:
        environment: Variables of the process.
        root: Where ``/dev`` and ``/usr`` are.
    """
    versions, found = installed(), devices(environment, root)
    facts = {
        "torch": versions.torch or "not installed",
        "torch_npu": versions.torch_npu or "not installed",
        "driver": driver_version(root) or "unknown",
        "evidence": EVIDENCE,
    }
    code, problem = _first_problem(versions, found, environment, root)
    if problem:
        nodes = bool(_nodes(root))
        return ProbeResult(
            score=0, reasons=(problem,), facts=facts, code=code, present=nodes and bool(found)
        )
    seen = tuple(DeviceFacts(index=i, name=name) for i, name in enumerate(found))
    return ProbeResult(score=_SCORE, devices=seen, facts=facts)


def installed(path: Sequence[str] | None = None) -> Installed:
    """What is installed, without importing it.

    Args:
        path: Folders to search; ``sys.path`` when not given.
    """
    where = sys.path if path is None else [*path]
    torch, torch_npu = (
        next(iter(metadata.distributions(name=name, path=where)), None)
        for name in ("torch", "torch_npu")
    )
    wanted = [
        text for text in (torch_npu.requires or () if torch_npu else ()) if "torch" in text
    ]
    return Installed(
        torch=torch.version if torch else "",
        cuda=torch is not None and _built_for_cuda(torch),
        torch_npu=torch_npu.version if torch_npu else "",
        wanted_torch=wanted[0] if wanted else "",
    )


def torch_problem(versions: Installed) -> str:
    """Why torch and torch_npu do not fit; empty if they do."""
    if versions.cuda:
        return (
            f"torch {versions.torch} is built for CUDA, next to which torch_npu ends the "
            "process. Install the CPU build of torch"
        )
    if not versions.torch_npu:
        return "torch_npu is not installed. Install the release of torch_npu for your torch"
    if versions.wanted_torch:
        wanted = Requirement(versions.wanted_torch).specifier
        if not wanted.contains(versions.torch, prereleases=True):
            return (
                f"torch_npu {versions.torch_npu} is made for torch {wanted}, and torch "
                f"{versions.torch} is installed. Install releases of equal version"
            )
    return ""


def cann_problem(environment: Mapping[str, str], root: Path = _ROOT) -> str:
    """Why the libraries of CANN cannot be loaded; empty if they are there."""
    named = environment.get("LD_LIBRARY_PATH", "").split(":")
    folders = [Path(name) for name in named if name] + [root / f for f in _SYSTEM_FOLDERS]
    missing = [name for name in _LIBRARIES if not any((f / name).is_file() for f in folders)]
    if not missing:
        return ""
    what = " and ".join(missing)
    if any((root / _TOOLKIT).glob("**/set_env.sh")):
        return (
            f"{what} of CANN cannot be found, though CANN is installed: its environment script "
            f"was not sourced. Run `{_SOURCE}` in this shell"
        )
    return f"{what} cannot be found: CANN is not installed. Install it, then run `{_SOURCE}`"


def devices(environment: Mapping[str, str], root: Path = _ROOT) -> tuple[str, ...]:
    """Names of the devices that ``ASCEND_RT_VISIBLE_DEVICES`` leaves."""
    simulated = environment.get(SIMULATED)
    if simulated:
        return (f"simulated device ({simulated})",)
    nodes = _nodes(root)
    setting = environment.get("ASCEND_RT_VISIBLE_DEVICES")
    if setting is None:
        return tuple(f"NPU {number}" for number in nodes)
    wanted: list[int] = []
    for word in setting.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", word)
        if found:
            wanted += range(int(found[1]), int(found[2] or found[1]) + 1)
    return tuple(f"NPU {number}" for number in wanted if number in nodes)


def driver_version(root: Path = _ROOT) -> str:
    """Version of the driver package; empty when none tells."""
    try:
        text = (root / _TOOLKIT / "driver/version.info").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"^Version=(\S+)", text, re.MULTILINE)
    return found[1] if found else ""


def graph_problem(environment: Mapping[str, str]) -> str:
    """Why nothing can be captured under these variables; empty if it can."""
    if environment.get("TASK_QUEUE_ENABLE") == "2":
        return (
            "TASK_QUEUE_ENABLE=2 is set, under which torch_npu refuses to capture. Set it to "
            "1, or run with --no-graphs"
        )
    if environment.get("ASCEND_LAUNCH_BLOCKING", "0") not in ("", "0"):
        return (
            "ASCEND_LAUNCH_BLOCKING is set: every launch waits, which a capture may not do. "
            "Unset it, or run with --no-graphs"
        )
    return ""


def soc_family(version: int) -> str:
    """Family of a device by torch_npu's number: one of ``a2 a3 950 310p 310b 910a``."""
    return next(
        (name for numbers, name in _FAMILIES if version in numbers), f"unknown {version}"
    )


def soc_problem(family: str) -> str:
    """Why devices of a family are refused; empty if they are not."""
    if family in _USABLE:
        return ""
    known = {
        "310p": "has no fused-infer attention and no bfloat16",
        "310b": "has no fused-infer attention",
        "910a": "has no fused-infer attention and no bfloat16",
    }
    reason = known.get(family, "is not known to this release")
    return f"the device ({family}) {reason}; usable are Atlas A2, A3 and Ascend 950"


def _first_problem(
    versions: Installed, found: Sequence[str], environment: Mapping[str, str], root: Path
) -> tuple[str, str]:
    """Code and sentence of what to mend first."""
    if problem := torch_problem(versions):
        return ("HW011" if versions.cuda or versions.torch_npu else "HW010"), problem
    if problem := cann_problem(environment, root):
        return "HW010", problem
    if found:
        return "", ""
    setting = environment.get("ASCEND_RT_VISIBLE_DEVICES")
    if _nodes(root):
        return "HW010", f"ASCEND_RT_VISIBLE_DEVICES={setting} hides every device"
    return (
        "HW010",
        "there is no device node /dev/davinci*. Install the driver, or pass the device",
    )


def _nodes(root: Path) -> list[int]:
    names = [path.name for path in (root / "dev").glob("davinci*")]
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"davinci(\d+)", name)))


def _built_for_cuda(torch: metadata.Distribution) -> bool:
    """By the local version, and by ``version.py`` where that is mute."""
    local = torch.version.partition("+")[2]
    if local:
        return local.startswith("cu")
    try:
        text = Path(str(torch.locate_file("torch/version.py"))).read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^cuda\b.*=\s*['\"]", text, re.MULTILINE) is not None
