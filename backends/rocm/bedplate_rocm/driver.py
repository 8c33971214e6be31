# SPDX-License-Identifier: Apache-2.0
"""What the driver and the installed packages say without being asked: files and metadata only.

Probing must neither import torch nor create a device context, hence a module apart from
``runtime``.  Called by ``plugin``; tests give other roots and environments.
"""

from __future__ import annotations

__all__ = ["Gpu", "TorchBuild", "driver_version", "gpus", "probe", "torch_build", "visible"]

import os
import re
import sys
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

from bedplate.contract import DeviceFacts, ProbeResult
from bedplate_rocm.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_SCORE = 800
_ROOT = Path("/")
_NODES = "sys/class/kfd/kfd/topology/nodes"
_LISTS = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
"""Each chooses among what the one before left; the last is read where the second is unset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device, as the driver's files describe it.

    Attributes:
        arch: Architecture word, such as ``gfx942``.
        name: What it is sold as, as far as the driver tells.
        uuid: ``GPU-…``; empty where the driver does not tell.
    """

    arch: str
    name: str
    uuid: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchBuild:
    """The installed torch and its Triton, from their metadata.

    Attributes:
        version: Such as ``2.11.0+rocm7.1``; empty when torch is absent.
        problem: Why they cannot use a device of ours; empty when they can.
    """

    version: str
    problem: str = ""


def probe(
    environment: Mapping[str, str],
    *,
    root: Path = _ROOT,
    build: TorchBuild | None = None,
    can_open: Callable[[Path], bool] | None = None,
) -> ProbeResult:
    """Whether ROCm could run here.

    Args:
        environment: Variables; lists of visible devices are obeyed as the runtime obeys them.
        root: Where ``/dev`` and ``/sys`` are.
        build: The torch to judge; the installed one when not given.
        can_open: Whether this user may use a device node.
    """
    build = build or torch_build()
    found = gpus(root)
    seen = visible(found, environment)
    facts = {
        "driver": driver_version(root) or "none",
        "torch": build.version or "not installed",
    }
    code, reason = _refusal(found, seen, build, environment, root, can_open or _can_open)
    if not reason:
        devices = tuple(
            DeviceFacts(index=i, name=gpu.name, arch=gpu.arch) for i, gpu in enumerate(seen)
        )
        return ProbeResult(score=_SCORE, devices=devices, facts=facts)
    # A device that the user has hidden, or that a container was not given, is not present.
    return ProbeResult(score=0, reasons=(reason,), facts=facts, code=code, present=bool(seen))


def _refusal(
    found: Sequence[Gpu],
    seen: Sequence[Gpu],
    build: TorchBuild,
    environment: Mapping[str, str],
    root: Path,
    can_open: Callable[[Path], bool],
) -> tuple[str, str]:
    """Code and reason; two empty strings if there is nothing against it."""
    door = root / "dev/kfd"
    if not found:
        if door.exists():
            return (
                "HW010",
                "the driver is loaded, but there is no device node /dev/dri/renderD*",
            )
        return "HW010", "no AMD driver is loaded: there is no /dev/kfd"
    if not seen:
        given = [f"{name}={environment[name]}" for name in _LISTS if name in environment]
        return "HW010", f"{' and '.join(given)} hides every device"
    if not can_open(door):
        return "HW010", (
            "this user may not open /dev/kfd; add the user to the groups of /dev/kfd and "
            "/dev/dri (often render and video), or give them to the container"
        )
    if build.problem:
        return "HW011", build.problem
    if not any(gpu.arch in ARCHITECTURES for gpu in seen):
        names = ", ".join(sorted({gpu.arch for gpu in seen}))
        return "HW012", (
            f"no kernel is compiled for {names}; there are {', '.join(ARCHITECTURES)}"
        )
    return "", ""


def driver_version(root: Path = _ROOT) -> str:
    """Version of the kernel module; ``in the kernel`` where it has none; empty without one."""
    module = root / "sys/module/amdgpu"
    return _read(module / "version").strip() or ("in the kernel" if module.exists() else "")


def gpus(root: Path = _ROOT) -> tuple[Gpu, ...]:
    """Devices with a node in ``/dev/dri``, in the order in which the runtime counts them."""
    if not (root / "dev/kfd").exists():
        return ()
    folders = [path for path in (root / _NODES).glob("*") if path.name.isdecimal()]
    found = (_gpu(folder, root) for folder in sorted(folders, key=lambda p: int(p.name)))
    return tuple(gpu for gpu in found if gpu is not None)


def _gpu(folder: Path, root: Path) -> Gpu | None:
    """The device of a node of the topology; ``None`` for processors and what is not ours."""
    fields = dict(re.findall(r"^(\w+) (\d+)$", _read(folder / "properties"), re.MULTILINE))
    version, render = int(fields.get("gfx_target_version", 0)), fields.get("drm_render_minor")
    if not version or not (root / f"dev/dri/renderD{render}").exists():
        return None
    arch = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
    product = _read(root / f"sys/class/drm/renderD{render}/device/product_name").strip()
    known = ARCHITECTURES.get(arch)
    unique = int(fields.get("unique_id", 0))
    return Gpu(
        arch=arch,
        name=product or (f"AMD {known.products} ({arch})" if known else f"AMD {arch}"),
        uuid=f"GPU-{unique:016x}" if unique else "",
    )


def visible(found: Sequence[Gpu], environment: Mapping[str, str]) -> tuple[Gpu, ...]:
    """What the lists of visible devices leave, in their order."""
    hip = _LISTS[1] if _LISTS[1] in environment else _LISTS[2]
    left = tuple(found)
    for name in (_LISTS[0], hip):
        if name in environment:
            left = _chosen(left, environment[name])
    return left


def _chosen(found: Sequence[Gpu], setting: str) -> tuple[Gpu, ...]:
    """Devices that a list names by number or name; it ends at the first unknown word."""
    chosen: list[Gpu] = []
    for word in (part.strip() for part in setting.split(",")):
        if word.isdecimal() and int(word) < len(found):
            chosen.append(found[int(word)])
        elif named := [g for g in found if g.uuid and word.lower() == g.uuid.lower()]:
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
    text = _read(Path(str(torch.locate_file("torch/version.py"))))
    hip = re.search(r"^hip\b.*=\s*['\"]", text, re.MULTILINE)
    if not (local.startswith("rocm") or hip):
        return TorchBuild(
            version=torch.version,
            problem=f"torch {torch.version} is built {_built_for(local)}and not for ROCm",
        )
    if not _has_triton(where):
        return TorchBuild(
            version=torch.version,
            problem="the Triton that belongs to this torch is missing (pytorch-triton-rocm or "
            "triton, from where torch came)",
        )
    return TorchBuild(version=torch.version)


def _built_for(local: str) -> str:
    if local.startswith("cu"):
        return "for CUDA "
    return "for the processor " if local.startswith("cpu") else "for another device "


def _has_triton(path: Sequence[str]) -> bool:
    if path is sys.path:
        return util.find_spec("triton") is not None
    return any((Path(folder) / "triton/__init__.py").is_file() for folder in path)


def _can_open(node: Path) -> bool:
    return os.access(node, os.R_OK | os.W_OK)


def _read(path: Path) -> str:
    """Text of a file that may be absent or closed to us."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
