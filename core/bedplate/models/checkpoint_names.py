# SPDX-License-Identifier: Apache-2.0
"""From the names in a checkpoint to the names in a module.

Checkpoints keep the names of their first authors (``block_sparse_moe.experts.3.w1``), modules
those of today (``mlp.experts.gate_up_proj``).  transformers knows the way from one to the
other; this file asks it and uses nothing else of its private parts.  ``weights.assign`` calls.
"""

from __future__ import annotations

__all__ = ["CheckpointNames", "LoadRules", "NamedPart", "load_rules"]

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class NamedPart:
    """One checkpoint tensor on its way into the module.

    Attributes:
        name: Its name in the checkpoint.
        target: Module name it leads to; the first one if it is split.
        pattern: Which conversion takes it; ``None`` if it is only renamed.
    """

    name: str
    target: str
    pattern: str | None


class CheckpointNames:
    """The renamings and conversions of one module class.

    Make a new one for each set of names: some renamings remember what they saw.

    Args:
        module: The model; asked for its classes and config only.
        names: Names of the module's own tensors, aliases included.
    """

    def __init__(self, module: nn.Module, names: Mapping[str, object]) -> None:
        self._module = module
        self._names = names
        mapping = get_model_conversion_mapping(module)
        self._renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
        self._converters = [step for step in mapping if isinstance(step, WeightConverter)]
        self._prefix = getattr(module, "base_model_prefix", "") or None

    def resolve(self, names: Sequence[str]) -> list[NamedPart]:
        """Where each checkpoint name leads.

        In the natural order of the names, which is the order in which experts are stacked.
        """
        return [self._resolve(name) for name in sorted(names, key=dot_natural_key)]

    def convert(
        self, parts: Sequence[NamedPart], tensors: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Apply the conversion that ``parts`` share; works on the meta device too.

        Args:
            parts: All with the same target and a pattern, in the order of ``resolve``.
            tensors: One for each part.

        Returns:
            Module name → tensor.

        Raises:
            Exception: Whatever the conversion raises when shapes do not fit together.
        """
        target = parts[0].target
        converter = deepcopy(
            next(c for c in self._converters if parts[0].pattern in c.source_patterns)
        )
        for part, tensor in zip(parts, tensors, strict=True):
            converter.add_tensor(target, part.name, part.pattern, tensor)
        config: Any = getattr(self._module, "config", None)
        made = converter.convert(target, model=self._module, config=config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }

    def _resolve(self, name: str) -> NamedPart:
        target, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._names
        )
        if target not in self._names and name in self._names:
            # A name of the module itself, which a renaming for old checkpoints matched.
            return NamedPart(name, name, None)
        return NamedPart(name, target, pattern)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRules:
    """What a module class says about loading it; regular expressions to search names with.

    Attributes:
        ignore_unexpected: Checkpoint tensors that nobody needs.
        ignore_missing: Buffers that may keep the values of their construction.
        float32_in_half: Tensors that stay float32 in a float16 model.
        float32_always: Tensors that stay float32 in any narrower model.
    """

    ignore_unexpected: tuple[str, ...]
    ignore_missing: tuple[str, ...]
    float32_in_half: tuple[str, ...]
    float32_always: tuple[str, ...]


# Buffers that used to be saved and are computed today; transformers drops them everywhere too.
FORMER_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


def load_rules(module: nn.Module) -> LoadRules:
    """The rules of ``module``, empty for a class that is not transformers' own."""

    def of(attribute: str) -> tuple[str, ...]:
        return tuple(sorted(getattr(module, attribute, None) or ()))

    return LoadRules(
        ignore_unexpected=(*of("_keys_to_ignore_on_load_unexpected"), *FORMER_BUFFERS),
        ignore_missing=of("_keys_to_ignore_on_load_missing"),
        float32_in_half=_globs(of("_keep_in_fp32_modules")),
        float32_always=_globs(of("_keep_in_fp32_modules_strict")),
    )


def _globs(patterns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(pattern.replace("*", ".*") for pattern in patterns)
