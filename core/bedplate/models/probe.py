# SPDX-License-Identifier: Apache-2.0
"""What attention a model really makes, found by watching it, never by reading its config.

``probe`` builds the model hollow (full geometry, no weights) and runs it three times on five
tokens: with masks, whose closures are asked what they show; as it will run; and counting
positions itself.  In the last two one token is spoiled, to see whether tokens reach each
other by any way but attention.  What is not understood is refused with its reason.
"""

from __future__ import annotations

__all__ = ["probe"]

import copy
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bedplate.contract.attention import AttentionCallSpec
from bedplate.errors import ModelError, UnsupportedModelError
from bedplate.models import latent
from bedplate.models import transformers_api as hf
from bedplate.models.hollow import hollow_model
from bedplate.models.mask_probe import MaskFacts
from bedplate.models.observation import NUM_TOKENS, observe
from bedplate.models.position_seam import counting_modules
from bedplate.models.rope_limit import rope_limit
from bedplate.models.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bedplate.models.observation import Observation, SeenCall

FIRST_TAINT, SECOND_TAINT = 1, 4
"""Tokens that are spoiled in turn; neither is the middle one, which mirroring would hide."""
DISTURBANCE = 1 << 20
"""Added to counts of tokens to see whether they matter; beyond any threshold in use."""
SHIFT = 7
"""Distance between the positions that are given and those that a model counts itself."""

HARMLESS = frozenset(
    {
        "dropout", "is_causal", "labels", "logits_to_keep", "output_attentions",
        "output_hidden_states", "output_router_logits", "position_ids", "return_dict", "s_aux",
        "sliding_window", "softcap", "use_cache",
    }
)  # fmt: skip
"""Keywords of an attention call that change nothing, or that the probe records."""


def probe(model_class: Callable[[Any], nn.Module], config: Any) -> ModelSpec:
    """Describe the model that ``model_class(config)`` would be.

    Takes neither memory nor time for weights. ``config`` and transformers' registries are
    left as they were found.

    Args:
        model_class: A causal-LM class of transformers, or one of the same shape.
        config: Its configuration.

    Raises:
        UnsupportedModelError: Something in it has no correct execution here; the message
            names what.
    """
    name = getattr(model_class, "__name__", str(model_class))
    try:
        return _probe(name, model_class, copy.deepcopy(config))
    except ModelError:
        raise
    except Exception as error:
        raise _refusal(
            name, f"it cannot be run as causal language model: {type(error).__name__}: {error}"
        ) from error


def _probe(name: str, model_class: Callable[[Any], nn.Module], config: Any) -> ModelSpec:
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model: Any = hollow_model(model_class, config)
    if getattr(model.config, "is_encoder_decoder", False):
        raise _refusal(name, "it has an encoder, and cross-attention is not served")
    hf.set_experts(model, "eager")
    expansions = latent.latent_modules(model)
    for module in expansions.values():
        latent.keep_latent(module)

    counting = observe(model, positions=None, masked=True, taint=SECOND_TAINT)
    seam = _seam(name, model, counting)
    masked = observe(model, positions=range(NUM_TOKENS), masked=True, seam=seam)
    plain = _observe_plain(name, model, seam)
    past_length = _past_length_seam(name, model, seam, plain)
    _check_paths(name, masked, plain, counting)
    calls = _describe(name, masked.calls, plain.calls)
    _check_absorption(name, expansions, calls, plain)
    offset = _position_offset(name, plain, counting)
    limit, limits = rope_limit(config)
    return ModelSpec(
        architecture=name,
        calls=calls,
        hidden_size=plain.hidden_size,
        position_modules=seam,
        past_length_seam=bool(past_length),
        position_offset=offset,
        takes_logits_to_keep=hf.takes_argument(model, "logits_to_keep"),
        siblings=_siblings(model, plain),
        evidence=_evidence(masked.calls, past_length),
        limits=limits,
        **_facts(model, config, limit, offset),
    )


def _refusal(name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} is not served: {reason}. Choose another model; docs/reference/models.md "
        "lists those that are",
        architecture=name,
        reason=reason,
    )


def _facts(model: Any, config: Any, limit: int | None, offset: int) -> dict[str, Any]:
    """What only the configuration knows, and what nothing but limits depends on."""
    text = hf.text_config(config)
    eos = getattr(text, "eos_token_id", None)
    head, embeddings = hf.output_embeddings(model), model.get_input_embeddings()
    declared = getattr(text, "max_position_embeddings", None)
    # Where the model adds an offset, its table has so many rows more than it has positions.
    table = declared - offset if isinstance(declared, int) else None
    bounds = [n for n in (table, limit) if n is not None]
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    return {
        "model_type": config.model_type,
        "vocab_size": int(text.vocab_size),
        "num_layers": int(text.num_hidden_layers),
        "max_position_embeddings": min(bounds, default=None),
        "eos_token_ids": tuple(eos) if isinstance(eos, list | tuple) else _some(eos),
        "tied_embeddings": head is not None
        and getattr(head, "weight", None) is getattr(embeddings, "weight", 0),
        "dtype": str(dtype).removeprefix("torch.") if dtype else "",
    }


def _some(value: int | None) -> tuple[int, ...]:
    return () if value is None else (value,)


# Judging what was seen.


def _seam(name: str, model: Any, counting: Observation) -> tuple[str, ...]:
    """Where positions must be replaced; nowhere if the model takes them."""
    if hf.takes_argument(model, "position_ids", passed_on=True):
        return ()
    modules = counting_modules(counting.positions)
    if not modules:
        raise _refusal(
            name,
            "its forward takes no position_ids, so requests of different "
            "lengths cannot share a batch",
        )
    return modules


def _observe_plain(name: str, model: Any, seam: tuple[str, ...]) -> Observation:
    """The model as it will run: positions given, and no mask."""
    positions = range(SHIFT, SHIFT + NUM_TOKENS)
    try:
        return observe(model, positions=positions, taint=FIRST_TAINT, seam=seam)
    except Exception as error:
        raise _refusal(
            name,
            "it works with its mask itself, as sparse or biased attention does "
            f"({type(error).__name__}: {error})",
        ) from error


def _siblings(model: nn.Module, plain: Observation) -> tuple[tuple[str, ...], ...]:
    """Linears that one after the other read the same tensor, in order of their calls."""
    groups = []
    for _, calls in itertools.groupby(plain.linears, key=lambda call: id(call[1])):
        paths = tuple(path for path, _ in calls)
        weights = {id(model.get_submodule(path).weight) for path in paths}
        if len(paths) > 1 and len(weights) == len(paths):
            groups.append(paths)
    return tuple(groups)


def _check_paths(
    name: str, masked: Observation, plain: Observation, counting: Observation
) -> None:
    """Refuse what attention alone does not explain."""
    if not plain.calls:
        raise _refusal(name, "it never calls the attention interface")
    if masked.reached:
        raise _refusal(
            name,
            "its states are not numbers even without weights, so the "
            "probe cannot see whether tokens mix",
        )
    if set(plain.reached) - {FIRST_TAINT} or set(counting.reached) - {SECOND_TAINT}:
        raise _refusal(
            name,
            "tokens reach each other outside attention (recurrent, "
            "convolutional or compressed state, or attention of its own)",
        )
    if not (plain.reached and counting.reached):
        raise _refusal(name, "its logits do not follow from its input embeddings")
    seen = [[(c.module, c.query, c.key, c.value) for c in run.calls] for run in (masked, plain)]
    if seen[0] != seen[1]:
        raise _refusal(name, "it attends differently with and without a mask")
    if any(call.mask is not None for call in plain.calls):
        raise _refusal(name, "it makes a mask although none is wanted")


def _past_length_seam(
    name: str, model: Any, seam: tuple[str, ...], plain: Observation
) -> bool | None:
    """Whether some part counts tokens although positions are given, and a seam corrects it.

    What the model counts is disturbed: nothing may change.

    Returns:
        ``None`` where the count cannot be disturbed, because it is used as index.
    """
    positions = range(SHIFT, SHIFT + NUM_TOKENS)

    def run(disturbance: int, *, past_length: bool) -> list[Tensor] | None:
        try:
            return observe(
                model, positions=positions, taint=FIRST_TAINT, seam=seam,
                past_length=past_length, disturbance=disturbance,
            ).values  # fmt: skip
        except IndexError:
            return None

    disturbed = run(DISTURBANCE, past_length=False)
    if disturbed is None or _equal(disturbed, plain.values):
        return None if disturbed is None else False
    first, second = (run(each, past_length=True) for each in (0, DISTURBANCE))
    if first is None or second is None or not _equal(first, second):
        raise _refusal(name, "it counts positions itself beside those given")
    return True


def _equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _describe(
    name: str, masked: Sequence[SeenCall], plain: Sequence[SeenCall]
) -> tuple[AttentionCallSpec, ...]:
    calls: list[AttentionCallSpec] = []
    first: dict[tuple[Any, ...], int] = {}
    ordinals: dict[str, int] = {}
    for call_id, (with_mask, seen) in enumerate(zip(masked, plain, strict=True)):
        _check_call(name, with_mask, seen)
        ordinal = ordinals[seen.module] = ordinals.get(seen.module, -1) + 1
        target = first.setdefault(seen.storage, call_id)
        calls.append(
            AttentionCallSpec(
                call_id=call_id, module=seen.module, ordinal=ordinal,
                alias_of=None if target == call_id else target,
                **_geometry(seen), **_visibility(with_mask),
            )
        )  # fmt: skip
    return tuple(calls)


def _check_call(name: str, masked: SeenCall, seen: SeenCall) -> None:
    unknown = sorted(set(seen.arguments) - HARMLESS)
    faults = {
        f"passes {', '.join(unknown)} to attention, which has no meaning here": unknown,
        "attends to keys that are not those of the new tokens": seen.key[2] != seen.query[2]
        or seen.query[0] != 1
        or seen.query[2] != NUM_TOKENS,
        "has a scale that is computed from data": isinstance(seen.scaling, Tensor),
        f"uses a mask that cannot be described: {masked.mask}": isinstance(masked.mask, str),
        "is bidirectional, so its keys and values cannot be cached": not _causal(masked),
        "drops part of its attention at random": bool(seen.arguments.get("dropout")),
        "has heads that do not divide by its key/value heads": seen.query[1] % seen.key[1],
    }
    for fault, found in faults.items():
        if found:
            raise _refusal(name, f"{seen.module} {fault}")


def _causal(call: SeenCall) -> bool:
    return call.mask.causal if isinstance(call.mask, MaskFacts) else call.is_causal


def _geometry(call: SeenCall) -> dict[str, Any]:
    _, heads, _, size = call.query
    _, kv_heads, _, key_size = call.key
    value_size = call.value[3]
    scale = size**-0.5 if call.scaling is None else float(call.scaling)
    expanded = key_size == size
    return {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        # A latent call hands over the latent as key and the rotated part as value.
        "head_dim": size if expanded else key_size + value_size,
        "value_dim": value_size if expanded else key_size,
        "value_in_key": not expanded,
        "scale": scale,
        "softcap": call.arguments.get("softcap"),
        "sinks": "s_aux" in call.arguments,
    }


def _visibility(call: SeenCall) -> dict[str, Any]:
    if isinstance(call.mask, MaskFacts):
        return {"causal": True, "window": call.mask.window, "chunk": call.mask.chunk}
    return {"causal": True, "window": call.arguments.get("sliding_window")}


def _check_absorption(
    name: str,
    expansions: dict[str, nn.Module],
    calls: Sequence[AttentionCallSpec],
    plain: Observation,
) -> None:
    """Refuse latent modules whose expansion is not the one that is absorbed."""
    tried: set[tuple[Any, ...]] = set()
    for call, seen in zip(calls, plain.calls, strict=True):
        module = expansions.get(call.module)
        kind = (type(module), seen.query[1:2], seen.query[3], call.head_dim, call.value_dim)
        if module is None or kind in tried:
            continue
        tried.add(kind)
        rope = call.head_dim - call.value_dim
        if not latent.absorbs(module, call.num_heads, seen.query[3] - rope, rope):
            raise _refusal(name, f"{call.module} expands its latent in an unknown way")


def _position_offset(name: str, given: Observation, counting: Observation) -> int:
    """What the model adds to 0, 1, 2 … when it counts positions itself."""
    common = given.positions.keys() & counting.positions.keys()
    offsets = {
        SHIFT - (mine - own)
        for place in common
        for mine, own in zip(given.positions[place], counting.positions[place], strict=True)
    }
    offsets.discard(SHIFT)  # unchanged by what was given: not positions
    if len(offsets) > 1:
        raise _refusal(name, "positions reach its parts in ways that contradict each other")
    if not offsets:
        raise _refusal(name, "it counts positions itself and ignores those given")
    return offsets.pop()


def _evidence(masked: Sequence[SeenCall], past_length: bool | None) -> tuple[str, ...]:
    bare = sum(call.mask is None for call in masked)
    found = {
        f"visibility of {bare} calls is from keywords, no mask was built": bare,
        "a count of the tokens is used as index and was not disturbed": past_length is None,
    }
    return tuple(sentence for sentence, holds in found.items() if holds)
