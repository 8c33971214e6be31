# SPDX-License-Identifier: Apache-2.0
"""Keep what a release has built: ``python tests/strangers/freeze.py`` before each release.

Writes wheels of every plugin and of the tutorial's backend, and the contract as it is, to
``frozen/VERSION``.  What lies there already stays: a frozen wheel is never built again.
"""

from __future__ import annotations

__all__ = ["FROZEN", "PACKAGES", "freeze"]

import shutil
import sys
import tempfile
from pathlib import Path

FROZEN = Path(__file__).with_name("frozen")
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [
    *(path.parent for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))),
    ROOT / "examples" / "acme",
]


def freeze(version: str) -> list[str]:
    """Names of the files that were added."""
    sys.path.insert(0, str(ROOT))
    from tests.contract.snapshot import text
    from tests.strangers.room import build_wheel

    folder = FROZEN / version
    folder.mkdir(parents=True, exist_ok=True)
    added = []
    with tempfile.TemporaryDirectory() as work:
        made = [build_wheel(package, Path(work)) for package in PACKAGES]
        for wheel in made:
            if not (folder / wheel.name).exists():
                shutil.copy(wheel, folder)
                added.append(wheel.name)
    contract = folder / "contract.json"
    if not contract.exists():
        contract.write_text(text(), encoding="utf-8")
        added.append(contract.name)
    return added


if __name__ == "__main__":
    from bedplate import __version__

    print("\n".join(freeze(__version__)) or "nothing to add")
