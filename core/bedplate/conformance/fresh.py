# SPDX-License-Identifier: Apache-2.0
"""What only a fresh process can tell: how light a plugin is, and whether it patches the core.

``python -m bedplate.conformance.fresh light NAME`` and ``… patches NAME`` print one JSON
object.  Level 0 runs them; everything heavy is imported inside.
"""

from __future__ import annotations

__all__ = ["ask", "changes", "main", "snapshot"]

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pkgutil import walk_packages
from typing import TYPE_CHECKING, Any

import bedplate
from bedplate import env
from bedplate.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HEAVY = ("torch", "numpy", "transformers", "triton", "jax", "tensorflow")
"""Modules that a light plugin does not import."""
_OWN = ("bedplate.conformance", "bedplate.testing", "bedplate.__main__")
_TIMEOUT_S = 300

Snapshot = dict[str, int]


def ask(question: str, name: str, path: Sequence[str] | None = None) -> dict[str, Any]:
    """Run this module in a fresh process with the same import path.

    Raises:
        InternalError: The process gave no answer; its last words are in the message.
    """
    environment = dict(env.environment())
    environment["PYTHONPATH"] = os.pathsep.join([*(path or ()), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", __name__, question, name, *(path or ())],
        env=environment, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode:
        words = done.stderr.strip().rpartition("\n")[2]
        raise InternalError(f"A fresh process could not load '{name}': {words}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return answer


def snapshot() -> Snapshot:
    """``module.attribute`` and ``module.Class.attribute`` → identity, of all of bedplate."""
    found: Snapshot = {}
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] != "bedplate" or name.startswith(_OWN):
            continue
        for attribute, value in vars(module).items():
            if attribute.startswith("__"):
                continue
            found[f"{name}.{attribute}"] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                for member, inner in vars(value).items():
                    if not member.startswith(("__", "_abc_")):
                        found[f"{name}.{attribute}.{member}"] = id(inner)
    return found


def changes(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """Names that were replaced, removed or added between two snapshots."""
    names = sorted({*before, *after})
    return [name for name in names if before.get(name) != after.get(name)]


def _light(name: str, path: Sequence[str] | None) -> dict[str, Any]:
    """Processor seconds of the plugin's import alone, and heavy modules that it loaded."""
    from bedplate.registry.enumerate import enumerate_plugins

    record = enumerate_plugins(path=path).backend(name)
    assert record is not None, f"no backend '{name}'"
    import bedplate.contract  # noqa: F401 - is not the plugin's
    from bedplate.registry.inspect import inspect_plugins  # noqa: F401 - is not the plugin's

    before = {module for module in HEAVY if module in sys.modules}
    begin = time.process_time()
    record.entry_point.load()
    seconds = time.process_time() - begin
    return {"seconds": seconds, "heavy": [m for m in HEAVY if m in sys.modules and
            m not in before]}  # fmt: skip


def _patches(name: str, path: Sequence[str] | None) -> dict[str, Any]:
    """What changed in our modules while the plugin was imported, bound and shut down."""
    for module in walk_packages(bedplate.__path__, "bedplate."):
        if not module.name.startswith(_OWN):
            import_module(module.name)
    from bedplate.config import EngineConfig
    from bedplate.reference.ops import OPERATIONS
    from bedplate.registry import DecisionLog, open_backend
    from bedplate.registry.select import BackendRequest

    before = snapshot()
    bound = open_backend(
        BackendRequest(text=name, source="the conformance kit"), config=EngineConfig(),
        reference_ops=OPERATIONS, decisions=DecisionLog(), path=path,
    )  # fmt: skip
    bound.shutdown()
    return {"changed": changes(before, snapshot())}


def _report(name: str, path: Sequence[str] | None) -> dict[str, Any]:
    """Whether report and probe answer where the environment hides everything."""
    from bedplate.registry import survey
    from bedplate.registry.probe import probe_backends

    found = probe_backends(survey(path=path, probe=False), {}, names=[name])
    record = found.backend(name)
    assert record is not None
    assert found.hooks is not None
    items = found.hooks.call(record.key, "bedplate_environment_report") or ()
    return {
        "code": record.error.code if record.error else "",
        "probed": record.probe is not None,
        "items": [type(item).__name__ for item in items],
    }


def main(arguments: Sequence[str]) -> None:
    """Question, name, folders."""
    question, name, *path = arguments
    answers = {"light": _light, "patches": _patches, "report": _report}
    sys.stdout.write(json.dumps(answers[question](name.partition(":")[0], path or None)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
