# SPDX-License-Identifier: Apache-2.0
"""Everything that running a model takes from transformers, in one place.

Each name below is held by one line of ``tests/unit/models/test_transformers_contract.py``,
which runs on the lowest supported release and on the newest.  The probe, the bridge and the
adapter import transformers through this module only.
"""

from __future__ import annotations

__all__ = [
    "ATTENTION_NAME",
    "causal_lm_classes",
    "causal_lm_config_class",
    "configs_of",
    "constant_rope",
    "isolate_configs",
    "output_embeddings",
    "register_attention",
    "registered_attention",
    "registered_mask",
    "set_attention",
    "set_experts",
    "takes_argument",
    "text_config",
]

import copy
import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ATTENTION_NAME = "bedplate"
"""Our run-time name.  No mask function is ever registered under it: that is what makes
transformers hand over ``None`` instead of building a mask (and synchronising to do so)."""


def causal_lm_classes() -> list[tuple[type[PreTrainedConfig], type[PreTrainedModel]]]:
    """Every (config class, causal-LM class) that transformers maps, each model class once."""
    pairs: dict[type[PreTrainedModel], type[PreTrainedConfig]] = {}
    for config_class, model_class in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        classes = model_class if isinstance(model_class, tuple | list) else (model_class,)
        for each in classes:
            # Composite configurations map to their decoder's class too; its own word counts.
            pairs[each] = each.config_class or config_class
    return sorted(((c, m) for m, c in pairs.items()), key=lambda pair: pair[1].__name__)


def causal_lm_config_class(model_type: str) -> type[PreTrainedConfig]:
    """The config class registered for ``model_type``."""
    return type(AutoConfig.for_model(model_type))


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The language model's part of a composite configuration, or the configuration itself."""
    return config.get_text_config(decoder=True)


def output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The module that turns hidden states into logits."""
    head: nn.Module | None = model.get_output_embeddings()
    return head


def takes_argument(model: PreTrainedModel, name: str, *, passed_on: bool = False) -> bool:
    """Whether the model's forward names ``name``.

    Args:
        model: The model.
        name: The argument.
        passed_on: Also where only the decoder inside names it; keywords are passed to it.
    """
    parts = [model]
    if passed_on:
        decoder = getattr(model, "get_decoder", lambda: None)()
        parts += [part for part in (model.base_model, decoder) if part is not None]
    return any(name in inspect.signature(type(part).forward).parameters for part in parts)


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """Every distinct configuration object that a module of ``model`` holds."""
    held = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in held if isinstance(c, PreTrainedConfig)}.values())


def isolate_configs(model: nn.Module) -> None:
    """Give ``model`` its own copies of the configurations it holds, sharing preserved.

    Transformers writes into them (the attention's name; ``is_causal`` in every forward), and
    callers may hold the same objects for another model.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            module.config = copy.deepcopy(config, memo)


def set_attention(model: nn.Module, name: str) -> None:
    """Let every attention module of ``model`` look up ``name``.

    ``PreTrainedModel.set_attn_implementation`` skips classes that do not declare support,
    many of which do call the interface; the probe counts calls instead of trusting flags.
    """
    for config in configs_of(model):
        config._attn_implementation = name


def set_experts(model: nn.Module, name: str) -> None:
    """Let every experts module of ``model`` look up ``name``."""
    for config in configs_of(model):
        config._experts_implementation = name


@contextmanager
def registered_attention(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Register an attention function for the duration of a block, then restore."""
    with _registered(AttentionInterface, name, function):
        yield


@contextmanager
def registered_mask(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Register a mask function for the duration of a block, then restore."""
    with _registered(AttentionMaskInterface, name, function):
        yield


@contextmanager
def _registered(interface: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    mapping = interface._global_mapping
    before = mapping.get(name)
    interface.register(name, function)
    try:
        yield
    finally:
        if before is None:
            del mapping[name]
        else:
            mapping[name] = before


def register_attention(function: Callable[..., Any]) -> None:
    """Register the bridge under its run-time name, for the life of the process."""
    AttentionInterface.register(ATTENTION_NAME, function)


def constant_rope(rotary: nn.Module) -> Callable[..., Any] | None:
    """``rotary.forward`` without the step that looks at the largest position of the batch.

    That step synchronises the device and lets one request change another's angles.

    Returns:
        The bound function, or ``None`` where ``rotary`` has no such step to leave out.
    """
    original = inspect.unwrap(type(rotary).forward)
    if original is type(rotary).forward:
        return None
    bound: Callable[..., Any] = torch.no_grad()(original.__get__(rotary))
    return bound
