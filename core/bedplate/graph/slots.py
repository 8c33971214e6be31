# SPDX-License-Identifier: Apache-2.0
"""Static input slots: the fixed addresses from which recorded graphs read a batch.

Every slot declares its shape, whether it has a row per request or per token, and what its
padding rows must hold.  ``SlotRegistry`` allocates each once, at the largest bucket, and loads
a batch so that nothing of an earlier batch remains.  Used by ``graph.runner``.

A load is one fused copy per (device, dtype): real rows come from the batch, padding rows from
a constant beside it.  Views are made once per number of rows and kept, because making them
costs the host more than the copies do.
"""

from __future__ import annotations

__all__ = ["PaddingPolicy", "SlotKind", "SlotRegistry", "SlotSpec", "decode_slots"]

from dataclasses import dataclass, replace
from enum import Enum
from math import prod
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bedplate.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from bedplate.graph.pool import SlotBuffers


class SlotKind(Enum):
    """What one row of a slot belongs to."""

    REQUEST = "request"
    """One row per request: B rows."""
    TOKEN = "token"
    """One row per new token: B · K rows, K tokens per request."""


class PaddingPolicy(Enum):
    """What a load does with the rows behind the real ones."""

    KEEP_PAD = "keep_pad"
    """Leaves them: values too wide to clear, which no real row reads."""
    FILL_SENTINEL = "fill_sentinel"
    """Writes the slot's ``fill``."""
    ZERO = "zero"
    """Writes zero."""
    FILL_ONCE = "fill_once"
    """Never writes any row: a constant, set to ``fill`` when allocated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSpec:
    """Declaration of one slot, of shape ``[*lead, rows, *trail]``.

    Attributes:
        name: Attribute of the batch that it is loaded from.
        kind: What a row belongs to.
        dtype: Of the slot; a source of another dtype is converted.
        policy: What padding rows hold.
        fill: Value before the first load, and of padding rows under ``FILL_SENTINEL``.
        lead: Sizes before the rows.
        trail: Sizes after the rows; a source with fewer columns leaves ``fill`` in the rest.
        host: On the host whatever the device is.
    """

    name: str
    kind: SlotKind
    dtype: torch.dtype
    policy: PaddingPolicy
    fill: int = 0
    lead: tuple[int, ...] = ()
    trail: tuple[int, ...] = ()
    host: bool = False

    def __post_init__(self) -> None:
        if self.policy is PaddingPolicy.ZERO and self.fill:
            raise ContractError(
                f"slot {self.name!r} is padded with zero but starts as {self.fill}; "
                "use FILL_SENTINEL for another padding value"
            )

    @property
    def overwrites_padding(self) -> bool:
        """Whether each load writes the padding rows."""
        return self.policy in (PaddingPolicy.ZERO, PaddingPolicy.FILL_SENTINEL)

    def shape(self, rows: int) -> tuple[int, ...]:
        """Shape at ``rows`` rows."""
        return (*self.lead, rows, *self.trail)

    def cut(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """View of rows ``start`` to ``stop``."""
        return tensor.narrow(len(self.lead), start, stop - start)


def decode_slots(
    *, seq_len_fill: int, index_dtype: torch.dtype, max_pages: int = 1
) -> tuple[SlotSpec, ...]:
    """Slots of a pass with a fixed number of new tokens per request.

    Padding is harmless by construction: request row 0 and slot 0 are reserved, and a length
    of ``seq_len_fill`` is what the attention asked for.

    Args:
        seq_len_fill: ``AttentionBackend.seq_len_fill_value``.
        index_dtype: Of ``out_cache_loc``.
        max_pages: Columns of the page table; 1 = none.
    """
    request, token = SlotKind.REQUEST, SlotKind.TOKEN
    zero, sentinel = PaddingPolicy.ZERO, PaddingPolicy.FILL_SENTINEL
    i32, i64 = torch.int32, torch.int64
    lengths = SlotSpec(
        name="seq_lens", kind=request, dtype=i32, policy=sentinel, fill=seq_len_fill
    )
    slots = [
        SlotSpec(name="input_ids", kind=token, dtype=i64, policy=zero),
        SlotSpec(name="positions", kind=token, dtype=i64, policy=zero),
        SlotSpec(name="out_cache_loc", kind=token, dtype=index_dtype, policy=zero),
        SlotSpec(name="req_pool_indices", kind=request, dtype=i32, policy=zero),
        lengths,
        replace(lengths, name="seq_lens_cpu", host=True),
    ]
    if max_pages > 1:
        table = (max_pages,)
        slots.append(
            SlotSpec(name="page_table", kind=request, dtype=i32, policy=zero, trail=table)
        )
    return tuple(slots)


@dataclass(frozen=True, slots=True)
class _FusedCopy:
    """One multi-tensor copy: sources picked from the batch, then constants."""

    pick: Callable[[Any], tuple[Tensor, ...]]
    targets: list[Tensor]
    constants: list[Tensor]

    def run(self, source: object) -> None:
        torch._foreach_copy_(self.targets, [*self.pick(source), *self.constants])


@dataclass(frozen=True, slots=True)
class _WideCopy:
    """A copy into a slot with columns, of which the source may have fewer."""

    name: str
    target: Tensor
    fill: int

    def run(self, source: object) -> None:
        value: Tensor = getattr(source, self.name)
        columns = value.shape[-1]
        if columns == self.target.shape[-1]:
            self.target.copy_(value)
            return
        self.target[..., :columns].copy_(value)
        self.target[..., columns:].fill_(self.fill)


class SlotRegistry:
    """The slots of one runner, over buffers that runners of a device may share.

    Args:
        specs: What to allocate.
        sizes: Buckets, ascending; the last decides the sizes of the buffers.
        tokens_per_request: K, rows of a token slot per request.
        device: Place of the slots that are not on the host.
        shared: Buffers of other runners, found by (name, numel, dtype, device).
    """

    def __init__(
        self,
        specs: Iterable[SlotSpec],
        *,
        sizes: Sequence[int],
        tokens_per_request: int,
        device: torch.device,
        shared: SlotBuffers,
    ) -> None:
        self._specs = tuple(specs)
        self._tokens_per_request = tokens_per_request
        self._device = device
        self._max_size = sizes[-1]
        # Held flat too: the shared mapping refers to the flat tensors weakly.
        self._flat = {spec.name: self._allocate(spec, shared) for spec in self._specs}
        self._buffers = {
            spec.name: self._flat[spec.name].view(self._full_shape(spec))
            for spec in self._specs
        }
        # The widest gap below a bucket is all the padding that a load can need.
        gap = max(b - a for a, b in zip((0, *sizes), sizes, strict=False)) - 1
        self._constants = {spec.name: self._padding(spec, gap) for spec in self._specs}
        self._views: dict[int, dict[str, Tensor]] = {}
        self._plans: dict[tuple[int, int], list[_FusedCopy | _WideCopy]] = {}
        self.reset()

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots, shared ones included."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def view(self, bucket: int) -> Mapping[str, Tensor]:
        """Views of all slots at ``bucket`` requests: same objects on every call.

        Returns:
            Name → ``[*lead, rows, *trail]``; owned by the registry, overwritten by ``load``.
        """
        views = self._views.get(bucket)
        if views is None:
            views = self._views[bucket] = {
                spec.name: spec.cut(self._buffers[spec.name], 0, self._rows(spec, bucket))
                for spec in self._specs
            }
        return views

    def load(self, source: object, num_requests: int, bucket: int) -> None:
        """Copy a batch into the first rows and pad the rest of the bucket.

        Args:
            source: Has an attribute for every slot that is not ``FILL_ONCE``.
            num_requests: Requests in ``source``, at most ``bucket``.
            bucket: Requests of the graph that will read the slots.
        """
        plan = self._plans.get((num_requests, bucket))
        if plan is None:
            plan = self._plans[num_requests, bucket] = self._plan(num_requests, bucket)
        for copy in plan:
            copy.run(source)

    def reset(self) -> None:
        """Make every row of every slot padding; the dummy batch of a capture."""
        for spec in self._specs:
            self._buffers[spec.name].fill_(spec.fill)

    def _rows(self, spec: SlotSpec, num_requests: int) -> int:
        per_request = self._tokens_per_request if spec.kind is SlotKind.TOKEN else 1
        return num_requests * per_request

    def _full_shape(self, spec: SlotSpec) -> tuple[int, ...]:
        return spec.shape(self._rows(spec, self._max_size))

    def _place(self, spec: SlotSpec) -> torch.device:
        return torch.device("cpu") if spec.host else self._device

    def _allocate(self, spec: SlotSpec, shared: SlotBuffers) -> Tensor:
        numel = prod(self._full_shape(spec))
        key = (spec.name, numel, spec.dtype, self._place(spec))
        flat = shared.get(key)
        if flat is None:
            flat = torch.empty(numel, dtype=spec.dtype, device=self._place(spec))
            shared[key] = flat
        return flat

    def _padding(self, spec: SlotSpec, num_requests: int) -> Tensor:
        rows = self._rows(spec, num_requests) if spec.overwrites_padding else 0
        place = self._place(spec)
        return torch.full(spec.shape(rows), spec.fill, dtype=spec.dtype, device=place)

    def _tail(self, spec: SlotSpec, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(padding rows of a slot, constant to copy there)."""
        constant = self._constants[spec.name]
        if stop - start > constant.shape[len(spec.lead)]:
            constant = self._constants[spec.name] = self._padding(spec, self._max_size)
        target = spec.cut(self._buffers[spec.name], start, stop)
        return target, spec.cut(constant, 0, stop - start)

    def _plan(self, num_requests: int, bucket: int) -> list[_FusedCopy | _WideCopy]:
        plan: list[_FusedCopy | _WideCopy] = []
        groups: dict[tuple[torch.device, torch.dtype], list[SlotSpec]] = {}
        for spec in self._specs:
            if spec.policy is PaddingPolicy.FILL_ONCE:
                continue
            groups.setdefault((self._place(spec), spec.dtype), []).append(spec)
        for specs in groups.values():
            plan += self._plan_group(specs, num_requests, bucket)
        return plan

    def _plan_group(
        self, specs: list[SlotSpec], num_requests: int, bucket: int
    ) -> list[_FusedCopy | _WideCopy]:
        names: list[str] = []
        targets: list[Tensor] = []
        wide: list[_FusedCopy | _WideCopy] = []
        tails: list[tuple[Tensor, Tensor]] = []
        for spec in specs:
            rows, all_rows = self._rows(spec, num_requests), self._rows(spec, bucket)
            target = spec.cut(self._buffers[spec.name], 0, rows)
            if spec.trail:
                wide.append(_WideCopy(spec.name, target, spec.fill))
            else:
                names.append(spec.name)
                targets.append(target)
            if spec.overwrites_padding and rows < all_rows:
                tails.append(self._tail(spec, rows, all_rows))
        targets += [target for target, _ in tails]
        if not targets:
            return wide
        return [_FusedCopy(_picker(names), targets, [c for _, c in tails]), *wide]


def _picker(names: list[str]) -> Callable[[Any], tuple[Tensor, ...]]:
    """Reads several attributes in one call, always as a tuple."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda source: tuple(getattr(source, name) for name in names)
