# SPDX-License-Identifier: Apache-2.0
"""Weights of a model: loading, the index of names, updates in place, export."""

from __future__ import annotations

from bedplate.models.weights.export import save_pretrained, save_sharded_model
from bedplate.models.weights.index import Transform, WeightIndex
from bedplate.models.weights.load import LoadedModel, LoadFormat, load_model
from bedplate.models.weights.update import (
    UpdateResult,
    get_weights_by_name,
    update_weights_from_disk,
    update_weights_from_tensor,
)

__all__ = [
    "LoadFormat",
    "LoadedModel",
    "Transform",
    "UpdateResult",
    "WeightIndex",
    "get_weights_by_name",
    "load_model",
    "save_pretrained",
    "save_sharded_model",
    "update_weights_from_disk",
    "update_weights_from_tensor",
]
