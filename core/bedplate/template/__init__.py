# SPDX-License-Identifier: Apache-2.0
"""The distribution that ``bedplate new-backend`` writes: a backend named ``acme``, as data.

Every file of ``acme/`` carries the suffix ``.txt``, so that no tool takes it for code of ours.
Renaming is all that is done to them: ``acme`` and ``Acme`` become the new name.
"""

from __future__ import annotations

__all__ = ["render"]

import re
from importlib.resources import files
from pathlib import Path

_SUFFIX = ".txt"


def render(name: str) -> dict[str, str]:
    """Path → text of every file of a new backend.

    Args:
        name: The backend's name, ``[a-z][a-z0-9_]*``.
    """
    root = Path(str(files(__name__))) / "acme"
    return {
        _renamed(path.relative_to(root).as_posix(), name).removesuffix(_SUFFIX): _renamed(
            path.read_text(encoding="utf-8"), name
        )
        for path in sorted(root.rglob("*"))
        if path.suffix == _SUFFIX
    }


def _renamed(text: str, name: str) -> str:
    spellings = {
        "bedplate-acme": f"bedplate-{name.replace('_', '-')}",
        "acme": name,
        "Acme": "".join(part.capitalize() for part in name.split("_")),
        "ACME": name.upper(),
    }
    return re.sub("|".join(spellings), lambda match: spellings[match[0]], text)
