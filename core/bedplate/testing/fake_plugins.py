# SPDX-License-Identifier: Apache-2.0
"""Fake distributions: real metadata folders and real modules, found by real enumeration.

For tests of the registry, and for injecting every fault of its table.
"""

from __future__ import annotations

__all__ = ["FakePlugins", "fake_plugins"]

import importlib
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent, indent
from typing import TYPE_CHECKING, Any

from bedplate.registry.enumerate import enumerate_plugins
from bedplate.registry.inspect import inspect_plugins
from bedplate.registry.probe import probe_backends

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from bedplate.env import PluginFilter
    from bedplate.registry.records import Survey

_BACKEND = """
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

_PLUGIN = """
from bedplate.contract import *
SEEN = []
class Plugin:
    @hookimpl
    def bedplate_manifest(self):
        return BackendManifest(name="{name}", kind="{kind}", targets={targets!r})
{hooks}
plugin = Plugin()
"""


class FakePlugins:
    """Builds distributions below one folder that is on ``sys.path``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def path(self) -> list[str]:
        """Where metadata is looked for: here and nowhere else."""
        return [str(self.root)]

    def distribution(
        self, name: str, *, version: str = "0.1", entries: str = "",
        requires: Sequence[str] = (), extras: Sequence[str] = (),
        modules: Mapping[str, str] | None = None, root: Path | None = None,
    ) -> None:  # fmt: skip
        """A metadata folder, and modules beside it.

        Args:
            name: Of the distribution.
            version: Of it.
            entries: Text of ``entry_points.txt``.
            requires: Requirement strings.
            extras: Names of extras.
            modules: File → source.
            root: Another folder than the usual one.
        """
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
        importlib.invalidate_caches()

    def home(
        self, entries: str = "", extras: Sequence[str] = ("cpu", "acme", "dev"), **rest: Any
    ) -> None:
        """A distribution called bedplate."""
        self.distribution("bedplate", version="1.0", entries=entries, extras=extras, **rest)

    def backend(
        self, name: str, *, distribution: str | None = None, manifest: str = "",
        probe: str = "score=50", extra: str = "", code: str | None = None, **rest: Any,
    ) -> None:  # fmt: skip
        """A backend that works, or does not, as its snippets say.

        Args:
            name: Of the entry point.
            distribution: Who offers it; ``bedplate-NAME`` if not given.
            manifest: Further arguments of its manifest.
            probe: Arguments of its probe's answer.
            extra: Further hooks, as source.
            code: The whole module instead.
            **rest: As in ``distribution``.
        """
        source = code or _BACKEND.format(
            name=name, manifest=manifest, probe=probe, extra=indent(dedent(extra), "    ")
        )
        self.distribution(
            distribution or f"bedplate-{name}",
            entries=f"[bedplate.backends]\n{name} = fake_{name}:backend\n",
            modules={f"fake_{name}.py": source},
            **rest,
        )

    def plugin(
        self, name: str, *, group: str = "plugins", hooks: str = "", kind: str | None = None,
        targets: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        """A plugin or an override pack with these hooks, as source."""
        kind = kind or {"plugins": "plugin", "kernels": "kernels"}[group]
        code = _PLUGIN.format(
            name=name, kind=kind, targets=targets, hooks=indent(dedent(hooks), "    ")
        )
        self.distribution(
            f"bedplate-{name}",
            entries=f"[bedplate.{group}]\n{name} = fake_{name}:plugin\n",
            modules={f"fake_{name}.py": code},
        )

    def inspected(self, allowed: PluginFilter | None = None) -> Survey:
        """Stages 1 and 2."""
        return inspect_plugins(enumerate_plugins(allowed, path=self.path))

    def probed(self, environment: Mapping[str, str] | None = None, **rest: Any) -> Survey:
        """Stages 1 to 3."""
        return probe_backends(self.inspected(), environment or {}, **rest)

    def module(self, name: str) -> Any:
        """The module of a fake, once it was loaded."""
        return sys.modules[f"fake_{name}"]


@contextmanager
def fake_plugins() -> Iterator[FakePlugins]:
    """An empty folder on ``sys.path``; it and what was imported from it are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="bedplate-fakes-") as root:
        sys.path.insert(0, root)
        importlib.invalidate_caches()
        try:
            yield FakePlugins(Path(root))
        finally:
            sys.path.remove(root)
            for name in [n for n in sys.modules if n.startswith("fake_")]:
                del sys.modules[name]
