# SPDX-License-Identifier: Apache-2.0
"""What is in a checkpoint folder: its config and its safetensors files.

Separate from reading tensors, because most mistakes of users are visible here, before torch
or transformers do anything.  ``load`` and ``update`` call it; nothing here touches a network.
"""

from __future__ import annotations

__all__ = ["find_weight_files", "require_config"]

import json
from pathlib import Path

from bedplate.errors import ModelNotFoundError, WeightsError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Files that hold other things, or the same weights under another vendor's names.
FOREIGN_PREFIXES = ("adapter_", "consolidated", "optimizer", "training_")


def require_config(folder: str | Path) -> Path:
    """The folder as a path, once it is known to hold a ``config.json``.

    Raises:
        ModelNotFoundError: No such folder, or no config in it; says what was found.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        kind = "it is a file" if path.exists() else "there is no such folder"
        raise ModelNotFoundError(
            f"No checkpoint at {str(path)!r}: {kind}. Give the local folder that holds "
            f"{CONFIG_NAME}; Bedplate does not download models.",
            path=str(path),
        )
    if not (path / CONFIG_NAME).is_file():
        raise ModelNotFoundError(
            f"{str(path)!r} has no {CONFIG_NAME}; it holds {_listing(path)}. Give the folder "
            "that contains the checkpoint itself.",
            path=str(path),
        )
    return path


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that make up the checkpoint in ``folder``, in reading order.

    An index file decides; else ``model.safetensors``; else every ``*.safetensors`` that is
    not an adapter or a second copy.

    Raises:
        ModelNotFoundError: There are no safetensors; says what was found.
        WeightsError: The index cannot be read, or names files that are not there.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"No checkpoint at {str(folder)!r}: there is no such folder.", path=str(folder)
        )
    if (folder / INDEX_NAME).is_file():
        return _files_of_index(folder / INDEX_NAME)
    if (folder / SINGLE_NAME).is_file():
        return (folder / SINGLE_NAME,)
    files = tuple(
        file
        for file in sorted(folder.glob("*.safetensors"))
        if not file.name.startswith(FOREIGN_PREFIXES)
    )
    if not files:
        raise ModelNotFoundError(_no_safetensors(folder), path=str(folder))
    return files


def _files_of_index(index: Path) -> tuple[Path, ...]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(file) for file in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{index} cannot be read as an index of shards ({type(error).__name__}: {error}). "
            "Copy the checkpoint again.",
            files=(index.name,),
        ) from error
    absent = tuple(name for name in names if not (index.parent / name).is_file())
    if absent:
        raise WeightsError(
            f"{index.name} names {len(names)} files, of which {len(absent)} are not in "
            f"{str(index.parent)!r}: {', '.join(absent)}. Copy the missing shards.",
            files=absent,
        )
    return tuple(index.parent / name for name in names)


def _no_safetensors(folder: Path) -> str:
    pickled = sorted(
        file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth")
    )
    if pickled:
        return (
            f"{str(folder)!r} holds {', '.join(pickled)} but no safetensors. Pickled weights "
            "can run code when they are read, so they are refused: load them once with "
            "transformers and call save_pretrained, which writes safetensors."
        )
    return (
        f"{str(folder)!r} holds no safetensors files, only {_listing(folder)}. Copy the "
        "weights there, or use the load format 'dummy' for random ones."
    )


def _listing(folder: Path, limit: int = 12) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) if names else "nothing"
