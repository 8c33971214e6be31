# SPDX-License-Identifier: Apache-2.0
"""Watching one forward of a hollow model: attention calls, positions, and what mixes tokens.

``probe`` runs it three times and compares.  Nothing is judged here; a record says what
arrived, and the probe decides what that means.

Shapes: T tokens, H query heads, K key/value heads, D head size, Dv value size.
"""

from __future__ import annotations

__all__ = ["NUM_TOKENS", "Observation", "SeenCall", "observe"]

import functools
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bedplate.models import latent
from bedplate.models import transformers_api as hf
from bedplate.models.hollow import HollowProducts
from bedplate.models.mask_probe import MaskFacts, MaskFunction, UnreadableMaskError, ask_mask
from bedplate.models.position_seam import PastLength, PositionSeam

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

NUM_TOKENS = 7
INPUT_IDS = (3, 5, 4, 7, 6, 9, 8)
_NAME = "bedplate_probe"


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenCall:
    """One attention call as it arrived.

    Attributes:
        module: Path of the calling module.
        query: Shape of the query; ``key`` and ``value`` likewise.
        scaling: As passed.
        storage: Identity of the key's and value's memory; equal = the same tensors again.
        mask: What the mask's closure says; a sentence where it could not be understood;
            ``None`` where no mask arrived.
        is_causal: The keyword, else the module's attribute, else true.
        arguments: The other keywords that are not ``None``.
    """

    module: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    scaling: Any
    storage: tuple[Any, ...]
    mask: MaskFacts | str | None
    is_causal: bool
    arguments: dict[str, Any]


@dataclass(slots=True)
class Observation:
    """What one forward showed.

    Attributes:
        calls: Attention calls in order.
        positions: Integer tensors of length T that reached modules, by place of arrival.
        values: Queries, keys and values of all calls, and the logits; NaN made zero.
        reached: Rows of the logits that the tainted token reached; empty without taint.
        hidden_size: Width of what the head received.
        linears: Path and input of every linear layer, in order of their calls.
    """

    calls: list[SeenCall] = field(default_factory=list)
    positions: dict[tuple[str, str, int], tuple[int, ...]] = field(default_factory=dict)
    reached: tuple[int, ...] = ()
    values: list[Tensor] = field(default_factory=list)
    hidden_size: int = 0
    linears: list[tuple[str, Tensor]] = field(default_factory=list)


@torch.no_grad()
def observe(
    model: Any,
    *,
    positions: range | None,
    masked: bool = False,
    taint: int | None = None,
    seam: Sequence[str] = (),
    past_length: bool = False,
    disturbance: int = 0,
) -> Observation:
    """Run one forward of ``model`` as the adapter would, and watch.

    Args:
        model: A hollow causal language model. Its configurations must be its own.
        positions: Position of each token; ``None`` lets the model count.
        masked: Let the model build masks, and ask their closures.
        taint: Make the embedding of this token NaN and see where it gets.
        seam: Modules that receive the positions, where the forward takes none.
        past_length: Pass a stand-in for the cache that corrects counts by its past length.
        disturbance: Added to every count of the tokens that the model makes itself.
    """
    seen = Observation()
    watcher = _Watcher(model, seen)
    with ExitStack() as stack:
        stack.enter_context(hf.registered_attention(_NAME, watcher.attend))
        if masked:
            stack.enter_context(hf.registered_mask(_NAME, watcher.make_mask))
        hf.set_attention(model, _NAME)
        given = _positions(model, stack, positions, seam)
        if positions is not None and past_length:
            counted = torch.arange(NUM_TOKENS) + disturbance
            given["past_key_values"] = PastLength(torch.tensor(positions), counted)
        stack.enter_context(_hooks(model, seen, taint=taint))
        stack.enter_context(_DisturbedCounts(disturbance))
        stack.enter_context(HollowProducts())
        out = model(input_ids=torch.tensor([INPUT_IDS]), use_cache=False, **given)
    seen.values.append(out.logits.nan_to_num())
    spoiled = out.logits.reshape(NUM_TOKENS, -1).isnan().any(-1)
    seen.reached = tuple(spoiled.nonzero()[:, 0].tolist())
    return seen


def _positions(
    model: nn.Module, stack: ExitStack, positions: range | None, seam: Sequence[str]
) -> dict[str, Any]:
    """The forward's argument for positions, or none where the seam hands them over."""
    if positions is None:
        return {}
    if not seam:
        return {"position_ids": torch.tensor([list(positions)])}
    replaced = PositionSeam(model, seam)
    replaced.positions = torch.tensor(positions)
    stack.callback(replaced.remove)
    return {}


class _Watcher:
    """The attention and mask functions of one observation."""

    def __init__(self, model: nn.Module, seen: Observation) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._seen = seen
        self._masks: dict[int, MaskFacts | str] = {}
        # Freed memory may be handed out again; identities hold only while all are alive.
        self._alive: list[Tensor] = []

    def make_mask(
        self, *args: Any, mask_function: MaskFunction | None = None, **kwargs: Any
    ) -> Tensor:
        mask = torch.zeros(1, 1, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool)
        self._alive.append(mask)
        try:
            facts: MaskFacts | str = ask_mask(mask_function)  # type: ignore[arg-type]
        except UnreadableMaskError as error:
            facts = str(error)
        self._masks[mask.data_ptr()] = facts
        return mask

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: Any = None,
        **arguments: Any,
    ) -> tuple[Tensor, None]:
        self._alive += [query, key, value]
        self._seen.values += [tensor.nan_to_num() for tensor in (query, key, value)]
        causal = arguments.get("is_causal")
        if causal is None:
            causal = getattr(module, "is_causal", True)
        self._seen.calls.append(
            SeenCall(
                module=self._names[id(module)],
                query=tuple(query.shape),
                key=tuple(key.shape),
                value=tuple(value.shape),
                scaling=scaling,
                storage=(_memory(key), _memory(value)),
                mask=self._facts(attention_mask),
                is_causal=bool(causal),
                arguments={k: v for k, v in arguments.items() if v is not None},
            )
        )
        return _local_attention(module, query, key, value), None

    def _facts(self, mask: Tensor | None) -> MaskFacts | str | None:
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            return f"it is a {type(mask).__name__}"
        known = self._masks.get(mask.untyped_storage().data_ptr())
        return "the model computes its own" if known is None else known


class _DisturbedCounts(TorchFunctionMode):
    """Every 0, 1, 2 … as long as the batch gets a number added."""

    def __init__(self, disturbance: int) -> None:
        self._disturbance = disturbance

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.arange and self._disturbance and result.shape == (NUM_TOKENS,):
            return result + self._disturbance
        return result


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tensor.shape, tensor.stride())


def _local_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``[1, T, H, Dv]``: every token sees itself alone, so that NaN stays in its row."""
    size = value.shape[-1]
    if latent.is_kept(module):  # the result is what the expansion would give
        size = latent.value_size(module, query.shape[1], query.shape[-1] - value.shape[-1])
    out = query.new_full((*query.shape[:1], query.shape[2], query.shape[1], size), 0.01)
    for operand in (query, key, value):
        spoiled = operand.isnan().any(-1).any(1)
        if spoiled.shape == out.shape[:2]:
            out[spoiled] = float("nan")
        elif spoiled.any():
            out.fill_(float("nan"))
    return out


@contextmanager
def _hooks(model: Any, seen: Observation, *, taint: int | None) -> Iterator[None]:
    counts: dict[tuple[str, str], int] = {}
    handles = []

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for key, value in (*enumerate(args), *kwargs.items()):
                place = (name, str(key))
                if _counts_positions(value):
                    number = counts[place] = counts.get(place, -1) + 1
                    seen.positions[(*place, number)] = _first_row(value)

        return hook

    def record_linear(name: str) -> Callable[..., None]:
        return lambda _module, args: seen.linears.append((name, args[0]))

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(record(name), with_kwargs=True))
        if type(module) is nn.Linear:
            handles.append(module.register_forward_pre_hook(record_linear(name)))
    head = hf.output_embeddings(model)
    if head is not None:
        handles.append(head.register_forward_pre_hook(lambda _m, a: _note_width(seen, a)))
    if taint is not None:
        spoil = functools.partial(_spoil, taint)
        handles.append(model.get_input_embeddings().register_forward_hook(spoil))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note_width(seen: Observation, args: tuple[Any, ...]) -> None:
    seen.hidden_size = args[0].shape[-1]


def _counts_positions(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and not value.is_floating_point()
        and value.dtype is not torch.bool
        and value.shape[-1:] == (NUM_TOKENS,)
        and _first_row(value) != INPUT_IDS
    )


def _first_row(value: Tensor) -> tuple[int, ...]:
    return tuple(value.reshape(-1, NUM_TOKENS)[0].tolist())


def _spoil(token: int, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    output = output.clone()
    output[:, token] = float("nan")
    return output
