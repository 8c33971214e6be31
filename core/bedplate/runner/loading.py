# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint folder to a model that the runner can drive: probe, plan, load, fuse.

The probe comes first: what cannot be run correctly is refused before a byte of weights is
read.
"""

from __future__ import annotations

__all__ = ["ReadyModel", "load_ready", "model_folder"]

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bedplate import demo
from bedplate.models.adapter import HFModel
from bedplate.models.fusion.coverage import require_coverage
from bedplate.models.fusion.plan import fuse
from bedplate.models.fusion.trial import Trial
from bedplate.models.probe import probe
from bedplate.models.weights.build import build_module, read_config, resolve_dtype
from bedplate.models.weights.load import LoadedModel, load_model
from bedplate.runner.overrides import prove_operations
from bedplate.runner.plan import ModelFacts, RunPlan, resolve_plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from bedplate.config import EngineConfig
    from bedplate.contract.decisions import Decision
    from bedplate.registry.bind import BoundBackend
    from bedplate.registry.decisions import DecisionLog


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyModel:
    """A model and how it will run.

    Attributes:
        plan: Every "auto" resolved.
        loaded: Module, configuration, weights.
        model: The module behind ``forward(ForwardBatch)``.
    """

    plan: RunPlan
    loaded: LoadedModel
    model: HFModel


def model_folder(config: EngineConfig) -> Path:
    """The checkpoint to load: the one that was named, else the bundled demo model."""
    return demo.path() if config.model is None else Path(config.model).expanduser()


def load_ready(
    config: EngineConfig,
    bound: BoundBackend,
    decisions: DecisionLog,
    progress: Callable[[int, int], None] | None = None,
) -> ReadyModel:
    """Probe, plan, load and fuse the model of ``config``.

    Raises:
        ModelError: There is no such model, it cannot be run correctly, or its weights do not
            fit it.
        ConfigError: A setting cannot be met.
    """
    folder = model_folder(config)
    hf_config = read_config(folder, trust_remote_code=config.trust_remote_code)
    spec = probe(_model_class(hf_config, config), hf_config)
    facts = ModelFacts(
        dtype=spec.dtype or None, max_position_embeddings=spec.max_position_embeddings
    )
    plan = resolve_plan(config, bound.capabilities, facts)
    _record(plan.decisions, decisions)
    loaded = load_model(
        folder,
        dtype=plan.dtype,
        device=bound.runtime.device,
        load_format=config.load_format,
        progress=progress,
        trust_remote_code=config.trust_remote_code,
        seed=config.seed,
        together=() if config.fusion == "off" else spec.siblings,
    )
    model = HFModel(loaded.module, spec, check=config.debug)
    trial = Trial(model, plan.max_context_len)
    most_tokens = min(plan.max_context_len, config.chunked_prefill_tokens)
    with bound.runtime.inference_guard():
        prove_operations(
            bound,
            decisions,
            loaded.module,
            trial,
            mode=config.fusion,
            most_tokens=most_tokens,
            timed=not config.deterministic,
        )
        fused = fuse(
            loaded.module,
            bound.ops,
            mode=config.fusion,
            trial=trial,
            rehearsal=bound.runtime.rehearsal,
            allow=bound.fuel.take,
        )
    _record(fused.decisions, decisions)
    if config.deterministic:
        require_coverage(loaded.module)
    return ReadyModel(plan=plan, loaded=loaded, model=model)


def _record(made: tuple[Decision, ...], decisions: DecisionLog) -> None:
    for decision in made:
        with decisions.choosing(decision.point) as decide:
            decide(decision)


def _model_class(hf_config: Any, config: EngineConfig) -> type[Any]:
    """The class that transformers would make; made once on the meta device to find out."""
    return type(
        build_module(
            deepcopy(hf_config),
            resolve_dtype(hf_config, "auto", {}),
            trust_remote_code=config.trust_remote_code,
        )
    )
