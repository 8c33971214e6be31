# SPDX-License-Identifier: Apache-2.0
"""Kernels in C, compiled on the machine that runs them.

The wheel stays pure Python: the source is compiled with the machine's own compiler at first
use and kept in the user's cache folder.  Without a compiler nothing breaks: ``load`` says
why, and the decision record shows which slower form was taken.
"""

from __future__ import annotations

__all__ = ["Kernels", "load"]

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("decode_attention.c")
_FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fPIC", "-fopenmp")


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled library, or why there is none.

    Attributes:
        library: Loaded shared object, or ``None``.
        reason: Where it came from, or what went wrong.
    """

    library: ctypes.CDLL | None
    reason: str


@cache
def load() -> Kernels:
    """Compile (once per machine and source) and load."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return Kernels(None, "no C compiler on this machine (looked for cc, gcc, clang)")
    try:
        path = _build(compiler)
        return Kernels(ctypes.CDLL(str(path)), f"compiled by {compiler}, kept in {path.parent}")
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        return Kernels(None, f"compiling failed: {str(detail).strip()[-300:]}")


def _build(compiler: str) -> Path:
    key = "\0".join(
        (_SOURCE.read_text(), *_FLAGS, compiler, platform.processor(), _processor())
    )
    folder = _cache_folder()
    target = folder / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        parts = [Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"]
        _run(compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(parts[0]))
        _run(compiler, "-shared", str(parts[0]), "-o", str(parts[1]), *_openmp(), "-lm")
        # Renaming is atomic, so that two processes starting together cannot read half a file.
        parts[1].rename(target)
    return target


def _openmp() -> tuple[str, ...]:
    """The OpenMP library that torch has loaded: a second one would fight it for the cores."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    if not bundled:
        return ("-fopenmp",)
    return (str(bundled[0]), f"-Wl,-rpath,{bundled[0].parent}")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bedplate" / "cpu"


def _processor() -> str:
    """Instruction sets: a cache folder may be shared between machines."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
