# SPDX-License-Identifier: Apache-2.0
"""Writing the weights of a running model to files.

Two forms: shards of one rank under the module's own names, which load fastest, and a
transformers checkpoint under the checkpoint's names.  Both see through merged storage: each
tensor is written once, under its own name, without its neighbours.
"""

from __future__ import annotations

__all__ = ["save_pretrained", "save_sharded_model"]

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import save_file

from bedplate.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from bedplate.models.weights.index import WeightIndex

PATTERN = "model-rank-{rank}-part-{part}.safetensors"


def save_sharded_model(
    index: WeightIndex,
    path: str | Path,
    pattern: str | None = None,
    max_size: int | None = None,
    *,
    rank: int = 0,
) -> tuple[Path, ...]:
    """Write this rank's tensors under the module's names, tied ones once.

    Args:
        index: Of the model.
        path: Folder; made if absent. Files of the same names are replaced.
        pattern: File name with ``{rank}`` and ``{part}``.
        max_size: Bytes of tensors in one file; a larger tensor is alone in its file. One
            part is on the host at a time.
        rank: This process's rank.

    Returns:
        The files, in order.

    Raises:
        ConfigError: The pattern lacks ``{part}``, or ``max_size`` is below 1.
    """
    pattern = pattern or PATTERN
    if "{part}" not in pattern or (max_size is not None and max_size < 1):
        raise ConfigError(
            f"pattern is {pattern!r} and max_size is {max_size}; the pattern must contain "
            "{part}, and the size must be at least 1 byte."
        )
    folder = Path(path).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for part, names in enumerate(_parts(index, max_size)):
        files.append(folder / pattern.format(rank=rank, part=part))
        save_file({name: _on_host(index, name) for name in names}, files[-1], {"format": "pt"})
    return tuple(files)


def save_pretrained(
    index: WeightIndex, path: str | Path, *, max_shard_size: int | str = "50GB"
) -> None:
    """Write a checkpoint that transformers, and ``load_model``, can read.

    Args:
        index: Of the model.
        path: Folder; made if absent.
        max_shard_size: Bytes, or a text such as ``5GB``.
    """
    names = [*index.names(), *index.aliases]
    module = cast("Any", index.module)
    module.save_pretrained(
        Path(path).expanduser(),
        state_dict={name: index.get(name) for name in names},
        max_shard_size=max_shard_size,
    )


def _parts(index: WeightIndex, max_size: int | None) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name in index.names():
        nbytes = index.infos[name].nbytes
        if names and max_size is not None and size + nbytes > max_size:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    if names:
        yield names


def _on_host(index: WeightIndex, name: str) -> Tensor:
    return index.get(name).cpu().contiguous()
