# SPDX-License-Identifier: Apache-2.0
"""What a compiled launch depends on, as one hash: unchanged sources need no compiling.

Prose does not count: neither comments and docstrings of a module, nor where the sizes of a
file of configurations come from.
"""

from __future__ import annotations

__all__ = ["ROOT", "source_hash"]

import ast
import hashlib
import io
import json
import re
import tokenize
from functools import cache
from pathlib import Path

from kernels.matrix.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = ROOT / "kernels/bedplate_triton"
_DEVICES = {
    "cuda": ("backends/cuda/bedplate_cuda/ops.py",),
    "hip": (
        "backends/rocm/bedplate_rocm/ops.py",
        "backends/rocm/bedplate_rocm/architectures.py",
    ),
}
"""Where backends tell kernels what their devices are."""
_RECORD = _PACKAGE / "cases/__init__.py"
"""What a case is made of: nothing is compiled from it, and all modules of cases import it."""


def source_hash(arch: str, module: str) -> str:
    """Of everything that the launches of a module's cases are compiled from.

    Args:
        arch: Key of ``TARGETS``.
        module: Of ``bedplate_triton.cases``.
    """
    files = _imports(_PACKAGE / f"cases/{module}.py")
    words = {arch, "default", *_families(arch)}
    for op in _configured(files):
        files |= {
            p for p in (_PACKAGE / "configs").glob(f"*/{op}.json") if p.parent.name in words
        }
    files |= {ROOT / name for name in _DEVICES[TARGETS[arch].backend]}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(_meaning(path))
    return digest.hexdigest()[:16]


@cache
def _meaning(path: Path) -> bytes:
    """A file without its prose, as it was when it was first asked for."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        data = json.loads(text)
        return json.dumps([data["default"], data.get("rules")], sort_keys=True).encode()
    return _code(text).encode()


def _code(text: str) -> str:
    """The lines of a module that are code, the same for every Python that reads them."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", 0), str):
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            lines[first:last] = [""] * (last - first)  # text that nobody reads: a docstring
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _families(arch: str) -> tuple[str, ...]:
    from bedplate_rocm.architectures import find

    found = find(arch)
    return (found.family,) if found else ()


def _configured(files: set[Path]) -> set[str]:
    """Operations whose launch sizes these modules choose."""
    pattern = r"configs\.choose\(\s*\"(\w+)\""
    return {
        op for path in files for op in re.findall(pattern, path.read_text(encoding="utf-8"))
    }


def _imports(path: Path) -> set[Path]:
    """A module of the package and all of it that it imports."""
    found, waiting = set(), [path]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += _direct(module)
    return found


@cache
def _direct(path: Path) -> tuple[Path, ...]:
    places = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "bedplate_triton"
        ):
            folder = _PACKAGE.joinpath(*str(node.module).split(".")[1:])
            places += [folder.with_suffix(".py"), folder / "__init__.py"]
            places += [folder / f"{alias.name}.py" for alias in node.names]
    return tuple(place for place in places if place.is_file() and place != _RECORD)
