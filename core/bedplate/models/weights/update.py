# SPDX-License-Identifier: Apache-2.0
"""Changing the weights of a running model, in place and all or nothing.

Trainers call these through ``ModelRunner``.  A set that does not fit is answered, not raised:
the model goes on with its old weights, bit for bit.  Storage never moves, so captured graphs
stay right.
"""

from __future__ import annotations

__all__ = [
    "Bucket",
    "NamedTensors",
    "UpdateFormat",
    "UpdateResult",
    "get_weights_by_name",
    "update_weights_from_disk",
    "update_weights_from_tensor",
]

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

from torch import Tensor

from bedplate.errors import ConfigError, ModelNotFoundError, WeightsError
from bedplate.models.weight_bucket import BucketEntry, reconstruct
from bedplate.models.weights.folder import find_weight_files
from bedplate.models.weights.sources import SafetensorsSource

if TYPE_CHECKING:
    from bedplate.models.weights.index import WeightIndex

UpdateFormat = Literal["direct", "flattened_bucket"]
NamedTensors: TypeAlias = Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]
Bucket: TypeAlias = tuple[Tensor, Sequence[BucketEntry]]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What became of an update; true if it was done.

    Attributes:
        ok: Whether the new weights are in place; if not, the old ones are, unchanged.
        message: ``Success``, or everything that did not fit.
        names: Entries of the index that were written.
    """

    ok: bool
    message: str
    names: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.ok


def update_weights_from_disk(index: WeightIndex, path: str | Path) -> UpdateResult:
    """Replace all weights by those of another checkpoint of the same shape.

    Args:
        index: Of the model.
        path: Folder with safetensors; no config is needed.

    Returns:
        Not ok if there is nothing to read, or if one tensor is missing, unexpected,
        misshapen or unreadable.
    """
    try:
        with SafetensorsSource(find_weight_files(Path(path).expanduser())) as source:
            names = index.update_from(source, complete=True)
    except (ModelNotFoundError, WeightsError) as error:
        return UpdateResult(ok=False, message=error.message)
    return UpdateResult(ok=True, message="Success", names=names)


def update_weights_from_tensor(
    index: WeightIndex,
    named_tensors: NamedTensors | Bucket,
    load_format: UpdateFormat | None = None,
) -> UpdateResult:
    """Replace some weights by tensors at hand.

    Args:
        index: Of the model.
        named_tensors: Name and tensor pairs, on any device; for ``flattened_bucket`` what
            ``weight_bucket.flatten`` returns.
        load_format: ``None`` takes names of the checkpoint or of the module; ``direct`` only
            names of the module, without conversion; ``flattened_bucket`` is one transfer.

    Raises:
        ConfigError: Unknown format.
    """
    if load_format not in (None, *get_args(UpdateFormat)):
        raise ConfigError(
            f"load_format is {load_format!r}; it must be None or one of "
            f"{', '.join(get_args(UpdateFormat))}."
        )
    try:
        if load_format == "flattened_bucket":
            named_tensors = reconstruct(*cast("Bucket", named_tensors))
        names = index.update(cast("NamedTensors", named_tensors), exact=load_format == "direct")
    except WeightsError as error:
        return UpdateResult(ok=False, message=error.message)
    return UpdateResult(ok=True, message="Success", names=names)


def get_weights_by_name(index: WeightIndex, name: str, truncate_size: int = 100) -> list[Any]:
    """The first rows of one tensor as nested lists of Python numbers, for comparisons.

    Args:
        index: Of the model.
        name: Module name, tied ones included.
        truncate_size: Rows at most; only these leave the device.

    Raises:
        WeightsError: No such name.
    """
    tensor = index.get(name)
    rows = tensor[:truncate_size] if tensor.dim() else tensor.reshape(1)
    values: list[Any] = rows.double().cpu().tolist()
    return values
