# SPDX-License-Identifier: Apache-2.0
"""Bedplate: the device-agnostic base of LLM inference.

Public names are loaded on first use, so that ``import bedplate`` loads neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
    from bedplate.batch.forward_mode import CaptureHiddenMode, ForwardMode
    from bedplate.batch.pipeline import PPProxyTensors
    from bedplate.config import EngineConfig
    from bedplate.engine.engine import Engine
    from bedplate.graph.runner import GraphRunner
    from bedplate.runner.model_runner import ModelRunner
    from bedplate.runner.sampling_params import SamplingParams

__version__ = "0.1.0"

_PUBLIC = {
    "CaptureHiddenMode": "bedplate.batch.forward_mode",
    "Engine": "bedplate.engine.engine",
    "EngineConfig": "bedplate.config",
    "ExtendPart": "bedplate.batch.forward_batch",
    "ForwardBatch": "bedplate.batch.forward_batch",
    "ForwardMode": "bedplate.batch.forward_mode",
    "GraphRunner": "bedplate.graph.runner",
    "ModelRunner": "bedplate.runner.model_runner",
    "PPProxyTensors": "bedplate.batch.pipeline",
    "SamplingParams": "bedplate.runner.sampling_params",
}

__all__ = [
    "CaptureHiddenMode",
    "Engine",
    "EngineConfig",
    "ExtendPart",
    "ForwardBatch",
    "ForwardMode",
    "GraphRunner",
    "ModelRunner",
    "PPProxyTensors",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bedplate' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
