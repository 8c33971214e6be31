# SPDX-License-Identifier: Apache-2.0
"""Weights of a model: loading, the index of names, updates in place, export."""

from __future__ import annotations

from bedplate.models.weights.index import Transform, WeightIndex
from bedplate.models.weights.load import LoadedModel, LoadFormat, load_model

__all__ = ["LoadFormat", "LoadedModel", "Transform", "WeightIndex", "load_model"]
