# SPDX-License-Identifier: Apache-2.0
"""A model from a local folder, or from a config alone with made-up weights.

Storage is allocated once, on the device; tensors stream into it group by group.  Peak memory
is the model and one group: one tensor, or one stack of experts.  No network is ever asked.
"""

from __future__ import annotations

__all__ = ["LoadFormat", "LoadedModel", "load_model"]

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig

from bedplate.errors import ConfigError
from bedplate.models.weights.build import (
    allocate,
    build_module,
    read_config,
    resolve_dtype,
    untie,
)
from bedplate.models.weights.dummy import DummySource
from bedplate.models.weights.folder import find_weight_files
from bedplate.models.weights.index import WeightIndex
from bedplate.models.weights.sources import SafetensorsSource, WeightSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from bedplate.models.weights.assign import AssignmentPlan

logger = logging.getLogger(__name__)

LoadFormat = Literal["auto", "safetensors", "dummy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        module: The transformers class, unmodified, in evaluation mode.
        config: The module's own config.
        index: Its weights; every later change goes through it.
        generation_config: From the folder, else from the config.
        folder: Where it came from; ``None`` for a config object.
    """

    module: nn.Module
    config: Any
    index: WeightIndex
    generation_config: Any
    folder: Path | None


def load_model(
    model: str | Path | PretrainedConfig,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    load_format: LoadFormat = "auto",
    progress: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    seed: int = 0,
    together: Iterable[Sequence[str]] = (),
) -> LoadedModel:
    """Build the model and fill its weights.

    Args:
        model: Local checkpoint folder, or a config (then the format must be ``dummy``).
        dtype: ``auto`` follows the config, then the checkpoint.
        device: Where weights and buffers live.
        load_format: ``auto`` and ``safetensors`` read the folder's safetensors; ``dummy``
            makes random weights, the same for the same names and seed.
        progress: Called with bytes done and bytes in all.
        trust_remote_code: Whether Python files of the folder may run.
        attn_implementation: Name of an attention interface; transformers' choice if ``None``.
        seed: Of dummy weights.
        together: Paths of modules whose weights are put side by side; see ``build.allocate``.

    Raises:
        ModelNotFoundError: No folder, no config, or no safetensors.
        UnsupportedModelError: Unknown architecture, or quantized.
        WeightsError: Tensors missing, unexpected or misshapen: all are listed.
        ConfigError: Unknown format or dtype.
    """
    known = get_args(LoadFormat)
    if load_format not in known:
        raise ConfigError(
            f"load_format is {load_format!r}; it must be one of {', '.join(known)}."
        )
    config = read_config(model, trust_remote_code=trust_remote_code)
    folder = None if isinstance(model, PretrainedConfig) else Path(model).expanduser()
    if folder is None and load_format != "dummy":
        raise ConfigError(
            "A config alone has no weights; give load_format='dummy', or a checkpoint folder."
        )
    with ExitStack() as stack:
        source = None
        if load_format != "dummy" and folder is not None:
            source = stack.enter_context(SafetensorsSource(find_weight_files(folder)))
        module = build_module(
            config,
            resolve_dtype(config, dtype, source.infos if source else {}),
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
        )
        index = _fill(
            module,
            source or DummySource(module, seed=seed, device=device),
            torch.device(device),
            progress,
            together,
        )
    generation_config = _generation_config(folder, config)
    module.generation_config = generation_config
    return LoadedModel(
        module=module,
        config=module.config,
        index=index,
        generation_config=generation_config,
        folder=folder,
    )


def _fill(
    module: nn.Module,
    source: WeightSource,
    device: torch.device,
    progress: Callable[[int, int], None] | None,
    together: Iterable[Sequence[str]],
) -> WeightIndex:
    dummy = isinstance(source, DummySource)
    plan = WeightIndex(module).plan(source, exact=dummy, complete=not dummy)
    if plan.problems.conflicts and _untie_unequal(module, plan):
        plan = WeightIndex(module).plan(source, complete=True)
    if plan.problems:
        raise plan.problems.error(
            f"The checkpoint does not fit {type(module).__name__}",
            "Compare config.json with the checkpoint it came with.",
        )
    # Everything fits: only now take the memory. Names, and so the plan, stay the same.
    allocate(module, device, together)
    index = WeightIndex(module)
    index.write(plan, source, progress=progress)
    return index


def _untie_unequal(module: nn.Module, plan: AssignmentPlan) -> bool:
    """Follow the checkpoint where it holds two unlike tensors that the config ties."""
    untied = False
    for first, second in plan.problems.conflicts:
        alias = second.target if second.target in plan.aliases else first.target
        if alias not in plan.aliases:
            continue  # two names of one slot: a real conflict, which the caller reports
        logger.warning(
            "%s and %s differ in the checkpoint, though its config ties them; loading both",
            first.name,
            second.name,
        )
        untie(module, alias)
        untied = True
    return untied


def _generation_config(folder: Path | None, config: Any) -> Any:
    if folder is not None and (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_model_config(config)
