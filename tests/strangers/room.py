# SPDX-License-Identifier: Apache-2.0
"""An environment of a stranger: bedplate and plugins are installed from wheels, nothing else.

Third-party packages are lent by the environment that runs the tests, as links, so that a room
is ready in seconds and needs no network.
"""

from __future__ import annotations

__all__ = ["Room", "build_wheel"]

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

_OURS = ("bedplate", "_bedplate", "__editable__", "_editable", "pip", "zz_")


class Room:
    """One virtual environment below a folder.

    Attributes:
        folder: Where commands run.
        packages: The room's own site-packages.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        root = folder / ".venv"
        venv.create(root, with_pip=False, symlinks=True)
        self.python = root / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.packages = root / "lib" / version / "site-packages"
        lent = root / "lent"
        lent.mkdir()
        for site in _sites():
            for path in site.iterdir():
                link = lent / path.name
                if not path.name.startswith(_OURS) and not link.exists():
                    link.symlink_to(path)
        (self.packages / "lent.pth").write_text(f"{lent}\n")

    def install(self, *what: Path | str) -> None:
        """Install folders or wheels, and nothing that they need."""
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet"]
        offline = ["--no-deps", "--no-index", "--no-build-isolation", "--no-compile"]
        _run([*pip, "--disable-pip-version-check", *offline, *what], self.folder)

    def bedplate(self, *arguments: str, **environment: str) -> str:
        """Standard output of one command of ours, which must succeed."""
        command = [self.python, "-m", "bedplate", *arguments]
        return _run(command, self.folder, environment).stdout

    def backends(self) -> dict[str, dict[str, object]]:
        """Rows of ``bedplate backends``."""
        rows = json.loads(self.bedplate("backends", "--json"))["plugins"]
        return {f"{row['kind']}:{row['name']}": row for row in rows}

    def answer(self, backend: str, **environment: str) -> dict[str, object]:
        """What the demo model answers to a sum, as JSON."""
        question = ("-p", "What is 12 + 30?", "--json", "--max-tokens", "16")
        return json.loads(
            self.bedplate("generate", "--backend", backend, *question, **environment)
        )

    def failure(self, *arguments: str) -> str:
        """What a command of ours says when it fails, which it must."""
        command = [str(self.python), "-m", "bedplate", *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=_clean(), capture_output=True, text=True, check=False
        )
        assert done.returncode > 0, done.stdout
        return done.stdout + done.stderr

    def run(
        self, *arguments: str | Path, folder: Path | None = None, **environment: str
    ) -> str:
        """Output of the room's Python."""
        return _run([self.python, *arguments], folder or self.folder, environment).stdout


def build_wheel(source: Path, into: Path) -> Path:
    """The wheel of a distribution's folder, built with what is installed."""
    into.mkdir(parents=True, exist_ok=True)
    before = set(into.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--no-deps", "--no-index", "--no-build-isolation", "-w", into, source], into)
    (made,) = set(into.glob("*.whl")) - before
    return made


def _sites() -> list[Path]:
    """Where this environment's third-party packages lie."""
    own = Path(sysconfig.get_path("purelib"))
    listed = [Path(line) for pth in own.glob("*.pth") for line in _lines(pth)]
    return [own, *(path for path in listed if path.name == "site-packages" and path.is_dir())]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _clean() -> dict[str, str]:
    """The environment without what a developer has set for this checkout."""
    ours = ("BEDPLATE_", "PYTHONPATH", "VIRTUAL_ENV")
    return {name: text for name, text in os.environ.items() if not name.startswith(ours)}


def _run(
    command: list[object], folder: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, check=False, text=True,
        capture_output=True, env=_clean() | (environment or {}),
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done
