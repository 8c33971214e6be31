# SPDX-License-Identifier: Apache-2.0
"""A module with the right buffers and no weights yet, then with storage for them.

Parameters are made on the meta device; buffers are made for real, because many of them
(rotary frequencies, for one) are computed in constructors and are in no checkpoint.
"""

from __future__ import annotations

__all__ = ["allocate", "build_module", "read_config", "resolve_dtype", "untie"]

import re
import threading
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from bedplate.errors import ConfigError, UnsupportedModelError
from bedplate.models.checkpoint_names import load_rules
from bedplate.models.weights.folder import require_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from bedplate.models.weights.sources import TensorInfo

DTYPE_NAMES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def read_config(model: str | Path | PretrainedConfig, *, trust_remote_code: bool) -> Any:
    """A config of the caller's own: read from a folder, or a deep copy.

    Raises:
        ModelNotFoundError: No folder or no config there.
        UnsupportedModelError: transformers does not know the architecture, or the checkpoint
            is quantized.
    """
    if isinstance(model, PretrainedConfig):
        config = deepcopy(model)
    else:
        folder = require_config(model)
        try:
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except (ValueError, KeyError, OSError) as error:
            raise UnsupportedModelError(
                f"transformers cannot read {folder / 'config.json'}: {error}"
            ) from error
    _refuse_quantized(config)
    return config


def resolve_dtype(
    config: Any, dtype: str | torch.dtype, infos: Mapping[str, TensorInfo]
) -> torch.dtype:
    """The dtype of the parameters: as asked, else the config's, else the checkpoint's.

    Raises:
        ConfigError: The name is unknown.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPE_NAMES:
            raise ConfigError(
                f"dtype is {dtype!r}; it must be 'auto' or one of {', '.join(DTYPE_NAMES)}."
            )
        return DTYPE_NAMES[dtype]
    for holder in (config, config.get_text_config()):
        declared = getattr(holder, "dtype", None)
        if declared is not None:
            named: torch.dtype = (
                getattr(torch, declared) if isinstance(declared, str) else declared
            )
            return named
    stored = (info.dtype for info in infos.values() if info.dtype in DTYPE_NAMES.values())
    return next(stored, torch.float32)


def build_module(
    config: Any,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> nn.Module:
    """The causal language model of ``config``: parameters on meta, buffers on the host.

    Args:
        config: Used by the module from now on; its dtype is set.
        dtype: Of the parameters, but for those that the class keeps in float32.
        trust_remote_code: Whether code in the folder may run.
        attn_implementation: Name of an attention interface; transformers' choice if ``None``.

    Raises:
        UnsupportedModelError: No causal language model class for this config.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        with _parameters_on_meta():
            module: nn.Module = AutoModelForCausalLM.from_config(config, **options)
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedModelError(
            f"transformers cannot build a causal language model from a config of type "
            f"{getattr(config, 'model_type', '?')!r}: {error}",
            model_type=getattr(config, "model_type", None),
        ) from error
    _keep_float32(module, dtype)
    return module.eval()


def allocate(
    module: nn.Module, device: torch.device, together: Iterable[Sequence[str]] = ()
) -> None:
    """Give every meta parameter its storage on ``device``, once, and move buffers there.

    The values are whatever the memory held. Ties between parameters are kept.

    Args:
        module: The model.
        device: Where to.
        together: Paths of modules whose weights follow each other in one storage, where they
            can: what merges them later then moves nothing.
    """
    made: dict[int, nn.Parameter] = {}
    for paths in together:
        weights = [module.get_submodule(path).weight for path in paths]
        if not any(id(weight) in made for weight in weights):
            made.update(_adjacent(weights, device))
    for _, parameters, name, parameter in _slots(module):
        if id(parameter) not in made:
            made[id(parameter)] = _parameter(
                torch.empty_like(parameter, device=device), parameter
            )
        parameters[name] = made[id(parameter)]
    for part in module.modules():
        for store in (part._buffers, vars(part)):
            moved = {
                key: value.to(device)
                for key, value in store.items()
                if isinstance(value, Tensor)
            }
            store.update(moved)


def _adjacent(weights: Sequence[Any], device: torch.device) -> dict[int, nn.Parameter]:
    """Parameters over one storage by identity of what they replace; none if unlike or tied."""
    alike = {(weight.shape[1:], weight.dtype) for weight in weights}
    if len(alike) > 1 or len({id(weight) for weight in weights}) < len(weights):
        return {}
    rows = [len(weight) for weight in weights]
    like = weights[0]
    merged = torch.empty((sum(rows), *like.shape[1:]), dtype=like.dtype, device=device)
    parts = torch.split(merged, rows)
    return {id(w): _parameter(part, w) for w, part in zip(weights, parts, strict=True)}


def untie(module: nn.Module, name: str) -> None:
    """Give a tied meta parameter a life of its own under ``name``."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    tied = owner.get_parameter(leaf)
    owner._parameters[leaf] = _parameter(torch.empty_like(tied), tied)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Turn each parameter that this thread registers into a meta tensor.

    Storage of a constructor's tensor is freed at once, and initialisation, which comes after
    registration, costs nothing.
    """
    thread = threading.get_ident()

    def to_meta(_module: nn.Module, _name: str, parameter: Any) -> Any:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return _parameter(parameter.detach().to("meta"), parameter)

    handle = register_module_parameter_registration_hook(cast("Any", to_meta))
    try:
        yield
    finally:
        handle.remove()


def _keep_float32(module: nn.Module, dtype: torch.dtype) -> None:
    """Widen the tensors that the class wants in float32 (routers and their like)."""
    rules = load_rules(module)
    patterns = rules.float32_always if dtype in (torch.float16, torch.bfloat16) else ()
    if dtype == torch.float16:
        patterns += rules.float32_in_half
    if not patterns:
        return
    wanted = re.compile("|".join(f"({pattern})" for pattern in patterns))
    made: dict[int, nn.Parameter] = {}
    for prefix, parameters, name, parameter in _slots(module):
        if wanted.search(f"{prefix}.{name}"):
            if id(parameter) not in made:
                made[id(parameter)] = _parameter(parameter.detach().float(), parameter)
            parameters[name] = made[id(parameter)]
    for prefix, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and wanted.search(f"{prefix}.{name}"):
                part._buffers[name] = buffer.float()


def _slots(module: nn.Module) -> Iterator[tuple[str, dict[str, Any], str, nn.Parameter]]:
    """Every place that holds a parameter: (module path, the owner's table, name, value)."""
    for prefix, part in module.named_modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                yield prefix, part._parameters, name, parameter


def _parameter(data: Tensor, like: nn.Parameter) -> nn.Parameter:
    parameter = nn.Parameter(data, requires_grad=False)
    parameter.__dict__.update(like.__dict__)
    return parameter


def _refuse_quantized(config: Any) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    get = quantization.get if isinstance(quantization, dict) else vars(quantization).get
    scheme = str(get("quant_method") or "unnamed")
    raise UnsupportedModelError(
        f"The checkpoint is quantized with the scheme {scheme!r}, which is not supported. Use "
        "an unquantized checkpoint of the same model.",
        scheme=scheme,
    )
