# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings that look at the longest request of the batch.

Long-rope and dynamic scaling choose their frequencies by the largest position *in the batch*:
packed requests would change each other's angles, cached keys would keep old ones, and the
look costs a synchronisation.  Up to the length at which they switch they are constant, and
that is what is served: ``rope_limit`` says up to where, ``freeze_ropes`` removes the look.
"""

from __future__ import annotations

__all__ = ["freeze_ropes", "rope_limit"]

from typing import TYPE_CHECKING, Any

from bedplate.models import transformers_api as hf

if TYPE_CHECKING:
    from torch import nn

_SWITCHING = ("dynamic", "longrope")


def rope_limit(config: Any) -> tuple[int | None, tuple[str, ...]]:
    """Length up to which every rotary embedding is constant, and a sentence for each.

    Returns:
        The smallest such length in tokens, ``None`` where nothing switches; the reasons.
    """
    text = hf.text_config(config)
    bounds = {}
    for parameters in _parameter_sets(getattr(text, "rope_parameters", None)):
        kind = str(parameters.get("rope_type", "default"))
        if any(word in kind for word in _SWITCHING):
            declared = getattr(text, "original_max_position_embeddings", None)
            original = parameters.get("original_max_position_embeddings") or declared
            bounds[kind] = int(original or text.max_position_embeddings)
    reasons = tuple(
        f"{kind} rotary embedding is served up to {bound} tokens, where it would switch by the "
        "longest request of the batch"
        for kind, bound in bounds.items()
    )
    return min(bounds.values(), default=None), reasons


def freeze_ropes(model: nn.Module) -> None:
    """Let no rotary embedding of ``model`` look at the batch; see ``rope_limit``."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        values = kinds.values() if isinstance(kinds, dict) else (kinds,)
        if any(word in str(kind) for kind in values for word in _SWITCHING):
            forward = hf.constant_rope(module)
            if forward is not None:
                module.forward = forward


def _parameter_sets(parameters: Any) -> list[dict[str, Any]]:
    """One set of parameters, or one for each type of layer."""
    if not isinstance(parameters, dict):
        return []
    if "rope_type" in parameters:
        return [parameters]
    return [each for each in parameters.values() if isinstance(each, dict)]
