# SPDX-License-Identifier: Apache-2.0
"""What the driver and the installed torch say without being asked: files and metadata only.

Probing must neither import torch nor create a device context, hence a module apart from
``runtime``.  Called by ``plugin``; tests give other roots and environments.
"""

from __future__ import annotations

__all__ = ["Gpu", "TorchBuild", "driver_version", "gpus", "probe", "torch_build", "visible"]

import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from bedplate.contract import DeviceFacts, ProbeResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SCORE = 800
_ROOT = Path("/")
_PROC = "proc/driver/nvidia"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device, as the driver's files describe it.

    Attributes:
        name: As the vendor calls it.
        uuid: ``GPU-…``; empty where the driver does not tell.
    """

    name: str
    uuid: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchBuild:
    """The installed torch, from its metadata.

    Attributes:
        version: Such as ``2.11.0+cu130``; empty when torch is absent.
        problem: Why it cannot use a device of ours; empty when it can.
    """

    version: str
    problem: str = ""


def probe(
    environment: Mapping[str, str], *, root: Path = _ROOT, build: TorchBuild | None = None
) -> ProbeResult:
    """Whether CUDA could run here.

    Args:
        environment: Variables; ``CUDA_VISIBLE_DEVICES`` is obeyed as the driver obeys it.
        root: Where ``/dev`` and ``/proc`` are.
        build: The torch to judge; the installed one when not given.
    """
    build = build or torch_build()
    version, found = driver_version(root), gpus(root)
    setting = environment.get("CUDA_VISIBLE_DEVICES")
    seen = visible(found, setting)
    facts = {"driver": version or "unknown", "torch": build.version or "not installed"}
    if seen and not build.problem:
        devices = tuple(DeviceFacts(index=i, name=gpu.name) for i, gpu in enumerate(seen))
        return ProbeResult(score=_SCORE, devices=devices, facts=facts)
    if seen:
        code, reason = "HW011", build.problem
    elif found:
        code, reason = "HW010", f"CUDA_VISIBLE_DEVICES={setting} hides every device"
    elif version:
        code, reason = "HW010", "a driver is loaded, but there is no device node /dev/nvidia*"
    else:
        code, reason = "HW010", "no NVIDIA driver is loaded"
    # A device that the user has hidden, or that a container was not given, is not present.
    return ProbeResult(score=0, reasons=(reason,), facts=facts, code=code, present=bool(seen))


def driver_version(root: Path = _ROOT) -> str:
    """Version of the loaded kernel module; empty when none tells."""
    found = re.search(r"\b\d{3,}\.\d[\d.]*\b", _read(root / _PROC / "version"))
    return found[0] if found else ""


def gpus(root: Path = _ROOT) -> tuple[Gpu, ...]:
    """Devices with a node in ``/dev``, in order of the bus where the driver tells it."""
    nodes = {
        found[1]: Gpu(name=f"NVIDIA device {found[1]}")
        for path in sorted((root / "dev").glob("nvidia[0-9]*"), key=lambda p: len(p.name))
        if (found := re.fullmatch(r"nvidia(\d+)", path.name))
    }
    described = {}
    for path in sorted((root / _PROC / "gpus").glob("*/information")):
        fields = dict(re.findall(r"^(.+?):\s*(.*?)\s*$", _read(path), re.MULTILINE))
        minor = fields.get("Device Minor", "")
        if minor in nodes:  # a container sees all descriptions, and the nodes it was given
            described[minor] = Gpu(
                name=fields.get("Model", nodes[minor].name), uuid=fields.get("GPU UUID", "")
            )
    return tuple((described or nodes).values())


def visible(found: Sequence[Gpu], setting: str | None) -> tuple[Gpu, ...]:
    """What ``CUDA_VISIBLE_DEVICES`` leaves, in its order; it ends at the first unknown word."""
    if setting is None:
        return tuple(found)
    chosen: list[Gpu] = []
    for word in (part.strip() for part in setting.split(",")):
        if found and word.startswith("MIG-"):
            chosen.append(Gpu(name=f"slice {word}", uuid=word))
        elif word.isdecimal() and int(word) < len(found):
            chosen.append(found[int(word)])
        elif named := [g for g in found if word.startswith("GPU-") and g.uuid.startswith(word)]:
            chosen.append(named[0])
        else:
            break
    return tuple(chosen)


def torch_build(path: Sequence[str] | None = None) -> TorchBuild:
    """The installed torch, judged by its version, and by its ``version.py`` where that is mute.

    Args:
        path: Folders to search; ``sys.path`` when not given.
    """
    where = sys.path if path is None else [*path]
    torch = next(iter(metadata.distributions(name="torch", path=where)), None)
    if torch is None:
        return TorchBuild(version="", problem="torch is not installed")
    local = torch.version.partition("+")[2]
    if not re.match(r"cu\d|cpu|rocm|xpu", local):
        text = _read(Path(str(torch.locate_file("torch/version.py"))))
        local = "cpu" if re.search(r"^cuda\b.*=\s*None\s*$", text, re.MULTILINE) else ""
    if local.startswith(("cpu", "rocm", "xpu")):
        return TorchBuild(
            version=torch.version, problem=f"torch {torch.version} is built without CUDA"
        )
    return TorchBuild(version=torch.version)


def _read(path: Path) -> str:
    """Text of a file that may be absent or closed to us."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
