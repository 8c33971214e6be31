# SPDX-License-Identifier: Apache-2.0
"""Fake distributions: real metadata folders and real modules, found by real enumeration."""

from __future__ import annotations

import sys
from textwrap import dedent, indent
from typing import TYPE_CHECKING

import pytest

from bedplate.registry.enumerate import enumerate_plugins
from bedplate.registry.inspect import inspect_plugins
from bedplate.registry.probe import probe_backends

if TYPE_CHECKING:
    from pathlib import Path

BACKEND = """
from types import SimpleNamespace
from contextlib import nullcontext
from bedplate.contract import *

EVENTS = []

class Runtime(DeviceRuntime):
    device = SimpleNamespace(type="{name}dev", index=0)
    def synchronize(self): ...
    def memory(self): return MemoryStatus(free_bytes=1, total_bytes=1)
    def record_event(self): ...
    def empty_host(self, num_bytes): ...
    def seed(self, seed): ...
    def empty_cache(self): ...
    def inference_guard(self): return nullcontext()
    def shutdown(self): EVENTS.append("runtime")

class Backend:
    @hookimpl
    def bedplate_manifest(self):
        return BackendManifest(name="{name}", {manifest})
    @hookimpl
    def bedplate_probe(self, request):
        return ProbeResult({probe})
    @hookimpl
    def bedplate_activate(self, request):
        EVENTS.append(request)
        return Runtime()
    @hookimpl
    def bedplate_capabilities(self):
        return BackendCapabilities(device_type="{name}dev")
    @hookimpl
    def bedplate_shutdown(self):
        EVENTS.append("shutdown")
{extra}

backend = Backend()
"""


class Fakes:
    """Builds distributions below one folder that is on ``sys.path``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def path(self) -> list[str]:
        return [str(self.root)]

    def distribution(
        self,
        name,
        *,
        version="0.1",
        entries="",
        requires=(),
        extras=(),
        modules=None,
        root=None,
    ):
        root = root or self.root
        folder = root / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Provides-Extra: {extra}" for extra in extras]
        lines += [f"Requires-Dist: {text}" for text in requires]
        (folder / "METADATA").write_text("\n".join(lines) + "\n\nLong description: yes\n")
        if entries:
            (folder / "entry_points.txt").write_text(dedent(entries))
        for file, code in (modules or {}).items():
            target = root / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(dedent(code))

    def home(self, entries="", extras=("cpu", "acme", "dev"), **rest):
        self.distribution("bedplate", version="1.0", entries=entries, extras=extras, **rest)

    def backend(
        self,
        name,
        *,
        distribution=None,
        manifest="",
        probe="score=50",
        extra="",
        code=None,
        **rest,
    ):
        source = code or BACKEND.format(
            name=name, manifest=manifest, probe=probe, extra=indent(dedent(extra), "    ")
        )
        self.distribution(
            distribution or f"bedplate-{name}",
            entries=f"[bedplate.backends]\n{name} = fake_{name}:backend\n",
            modules={f"fake_{name}.py": source},
            **rest,
        )

    def plugin(self, name, *, group="plugins", hooks="", kind=None, targets=()):
        kind = kind or {"plugins": "plugin", "kernels": "kernels"}[group]
        head = f"""
from bedplate.contract import *
SEEN = []
class Plugin:
    @hookimpl
    def bedplate_manifest(self):
        return BackendManifest(name="{name}", kind="{kind}", targets={targets!r})
"""
        code = head + indent(dedent(hooks), "    ") + "\nplugin = Plugin()\n"
        self.distribution(
            f"bedplate-{name}",
            entries=f"[bedplate.{group}]\n{name} = fake_{name}:plugin\n",
            modules={f"fake_{name}.py": code},
        )

    def inspected(self, allowed=None):
        return inspect_plugins(enumerate_plugins(allowed, path=self.path))

    def probed(self, environment=None, **rest):
        return probe_backends(self.inspected(), environment or {}, **rest)

    def module(self, name):
        return sys.modules[f"fake_{name}"]


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("BEDPLATE_BACKEND", "BEDPLATE_PLUGINS", "BEDPLATE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    yield Fakes(tmp_path)
    for name in [n for n in sys.modules if n.startswith("fake_")]:
        del sys.modules[name]
