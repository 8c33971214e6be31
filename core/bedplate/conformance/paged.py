# SPDX-License-Identifier: Apache-2.0
"""PagedBench: one attention call over a paged cache in which everything nobody owns is NaN.

Pages lie in random order.  Slots that no token owns are NaN: free pages, and the rest of last
pages; only page 0, where padding writes, is finite.  Columns of the table beyond a request's
length name such slots, and rows of other requests do.  So whoever reads what he may not, by a
page, a token or a row, spreads NaN.

Shapes: T new tokens, B requests, L tokens of one, H query heads, K key/value heads, D head
size, Dv value size.
"""

from __future__ import annotations

__all__ = ["PagedBench"]

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
from bedplate.conformance.cases.attention import MAX_CONTEXT_LEN, AttentionCase
from bedplate.conformance.check import require
from bedplate.conformance.placing import Guards
from bedplate.contract.attention import AttentionBuild
from bedplate.contract.memory import KVPoolRequest
from bedplate.memory.factory import make_kv_pool
from bedplate.reference.attention import attend, visible

if TYPE_CHECKING:
    from bedplate.contract.attention import AttentionProvider
    from bedplate.contract.memory import KVPool
    from bedplate.registry.bind import BoundBackend

_SPARE_PAGES = 3


class PagedBench:
    """Everything that one call needs, and its oracle.

    Args:
        case: Call, pass and dtypes.
        bound: The backend.
        provider: Whose attention it is.
        order: Seed of the order of pages; the numbers do not depend on it.
        deterministic: As in ``AttentionBuild``.
    """

    def __init__(
        self, case: AttentionCase, bound: BoundBackend, provider: AttentionProvider, *,
        order: int = 0, deterministic: bool = False,
    ) -> None:  # fmt: skip
        self.case, self.bound = case, bound
        self.device = bound.runtime.device
        self._index = getattr(torch, bound.capabilities.memory.index_dtype)
        self._draw_tokens()
        self._lay_out_pages(order)
        self.pool = self._make_pool()
        self.attention = provider.build(self._build(deterministic))
        self._fill_padding = int(self.attention.seq_len_fill_value)

    def run(self) -> Tensor:
        """``[T, H, Dv]`` of the real rows, on the host.

        Raises:
            Wrong: Something was written where it may not.
        """
        with self.bound.runtime.inference_guard():
            return self._run(self.batch())

    def alone(self, row: int, provider: AttentionProvider) -> Tensor:
        """``[n, H, Dv]``: one request's part of ``run`` when nobody else is in the pass."""
        work = replace(self.case.work, requests=(self.case.work.requests[row],), padding=0)
        other = PagedBench(
            replace(self.case, work=work), self.bound, provider, deterministic=True
        )
        other._queries = [self._queries[row]]
        other._new_keys, other._new_values = [self._new_keys[row]], [self._new_values[row]]
        other._fill_cache(other.pool)
        return other.run()

    def wanted(self) -> Tensor:
        """``[T, H, Dv]``: what the call means, from keys and values as they are stored."""
        call, parts = self.case.call, []
        for row, (prefix, new) in enumerate(self.case.work.requests):
            keys, values = self._keys[row], self._values[row]
            positions = torch.arange(prefix + new)
            mask = visible(positions[prefix:], positions, call)
            parts.append(attend(self._queries[row], keys, values, mask, call, self._sinks))
        return torch.cat(parts)

    def batch(self) -> ForwardBatch:
        """The pass, on the device, padding included."""
        work, padding = self.case.work, self.case.work.padding
        counts = [new for _, new in work.requests]
        lengths = [prefix + new for prefix, new in work.requests]
        fill = [self._fill_padding] * padding
        seq_lens = torch.tensor(lengths + fill, dtype=torch.int32)
        positions = [torch.arange(p, p + n) for p, n in work.requests]
        slots = [self._slots[i][p:] for i, (p, _) in enumerate(work.requests)]
        zeros = torch.zeros(padding, dtype=torch.int64)
        rows = torch.cat([self._rows, zeros])
        extend = self._extend_part(counts) if work.mode.is_extend() else None
        send = self._send
        return ForwardBatch(
            mode=work.mode,
            batch_size=len(seq_lens),
            input_ids=send(torch.zeros(sum(counts) + padding, dtype=torch.int64)),
            positions=send(torch.cat([*positions, zeros])),
            req_pool_indices=send(rows.int()),
            seq_lens=send(seq_lens),
            seq_lens_cpu=seq_lens,
            out_cache_loc=send(torch.cat([*slots, zeros]).to(self._index)),
            extend=extend,
        )

    def _run(self, batch: ForwardBatch) -> Tensor:
        case = self.case
        real = sum(new for _, new in case.work.requests)
        guards = Guards(self.device, spaced=("q", "k", "v"))
        inputs = guards.place(self._inputs())
        before = [stored.clone() for stored in self._stored()]
        self.attention.prepare(batch)
        self.attention.prepare_in_graph(batch)
        out = self.attention.forward(
            inputs["q"], inputs["k"], inputs.get("v"), case.call, batch,
            sinks=inputs.get("sinks"),
        )  # fmt: skip
        shape = (len(inputs["q"]), case.call.num_heads, case.call.value_dim)
        require(tuple(out.shape) == shape, f"gives {list(out.shape)}, not {list(shape)}")
        require(out.dtype == inputs["q"].dtype, f"gives {out.dtype}, not {inputs['q'].dtype}")
        result = out[:real].cpu().clone()
        guards.check(())
        self._check_cache(before, batch)
        return result

    def _inputs(self) -> dict[str, Any]:
        work, call = self.case.work, self.case.call
        fresh = [prefix for prefix, _ in work.requests]

        def packed(parts: list[Tensor], starts: list[int]) -> Tensor:
            rows = torch.cat([part[at:] for part, at in zip(parts, starts, strict=True)])
            padding = torch.ones((work.padding, *rows.shape[1:]), dtype=rows.dtype)
            return torch.cat([rows, padding])

        inputs = {
            "q": packed(self._queries, [0] * len(fresh)),
            "k": packed(self._new_keys, fresh),
        }
        if not call.value_in_key:
            inputs["v"] = packed(self._new_values, fresh)
        if self._sinks is not None:
            inputs["sinks"] = self._sinks
        return inputs

    def _draw_tokens(self) -> None:
        """Queries of new tokens; keys and values of all, as given and as stored."""
        case, call = self.case, self.case.call
        dtype, stored = getattr(torch, case.dtype), getattr(torch, case.kv_dtype)
        generator = torch.Generator().manual_seed(7)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        heads = call.num_kv_heads
        self._queries, self._new_keys, self._new_values = [], [], []
        for prefix, new in case.work.requests:
            length = prefix + new
            self._queries.append(draw(new, call.num_heads, call.head_dim))
            self._new_keys.append(draw(length, heads, call.head_dim))
            self._new_values.append(draw(length, heads, call.value_dim))
        shared = case.work.shared
        if shared:
            self._new_keys[1][:shared] = self._new_keys[0][:shared]
            self._new_values[1][:shared] = self._new_values[0][:shared]
        if call.value_in_key:
            self._new_values = [keys[..., : call.value_dim] for keys in self._new_keys]
        self._keys = [keys.to(stored).float() for keys in self._new_keys]
        self._values = [values.to(stored).float() for values in self._new_values]
        self._sinks = draw(call.num_heads) if call.sinks else None

    def _lay_out_pages(self, order: int) -> None:
        size, requests = self.case.page_size, self.case.work.requests
        counts = [-(-(prefix + new) // size) for prefix, new in requests]
        self._num_pages = sum(counts) + _SPARE_PAGES
        generator = torch.Generator().manual_seed(order)
        pages = 1 + torch.randperm(self._num_pages, generator=generator)
        self._slots: list[Tensor] = []
        parts = torch.split(pages, [*counts, _SPARE_PAGES])
        for (prefix, new), mine in zip(requests, parts, strict=False):
            slots = (mine[:, None] * size + torch.arange(size)).flatten()
            self._slots.append(slots[: prefix + new])
        shared = self.case.work.shared // size * size
        if shared:
            self._slots[1] = torch.cat([self._slots[0][:shared], self._slots[1][shared:]])
        free = int(pages[-1]) * size
        table = torch.full((len(requests) + 3, MAX_CONTEXT_LEN), free, dtype=torch.int32)
        table[0] = 0
        self._rows = 1 + torch.randperm(len(requests) + 1, generator=generator)[: len(requests)]
        for row, slots in zip(self._rows.tolist(), self._slots, strict=True):
            table[row, : len(slots)] = slots.int()
        self.req_to_token = self._send(table)

    def _make_pool(self) -> KVPool:
        """Storage with everything spoiled but page 0, then the cached tokens written."""
        case = self.case
        request = KVPoolRequest(
            runtime=self.bound.runtime, calls=(case.call,), page_size=case.page_size,
            num_tokens=self._num_pages * case.page_size, dtype=getattr(torch, case.kv_dtype),
        )  # fmt: skip
        pool = self.bound.make_kv_pool(request) or make_kv_pool(request)
        for stored in {id(s): s for s in (pool.key(0), pool.value(0))}.values():
            spoil(stored[case.page_size :])
        self._fill_cache(pool)
        return pool

    def _fill_cache(self, pool: KVPool) -> None:
        """Write the cached tokens of every request."""
        case = self.case
        for row, (prefix, _) in enumerate(case.work.requests):
            slots = self._send(self._slots[row][:prefix].to(self._index))
            values = (
                None if case.call.value_in_key else self._send(self._new_values[row][:prefix])
            )
            pool.write(0, slots, self._send(self._new_keys[row][:prefix]), values)

    def _build(self, deterministic: bool) -> AttentionBuild:
        return AttentionBuild(
            runtime=self.bound.runtime,
            calls=(self.case.call,),
            kv_pool=self.pool,
            req_to_token=self.req_to_token,
            page_size=self.case.page_size,
            dtype=getattr(torch, self.case.dtype),
            max_batch_size=8,
            max_context_len=MAX_CONTEXT_LEN,
            deterministic=deterministic,
        )

    def _extend_part(self, counts: list[int]) -> ExtendPart:
        new = torch.tensor(counts, dtype=torch.int32)
        prefix = torch.tensor([p for p, _ in self.case.work.requests], dtype=torch.int32)
        return ExtendPart(
            seq_lens=self._send(new),
            prefix_lens=self._send(prefix),
            start_loc=self._send((new.cumsum(0) - new).int()),
            seq_lens_cpu=new,
            prefix_lens_cpu=prefix,
        )

    def _stored(self) -> list[Tensor]:
        tensors = [self.pool.key(0)]
        if not self.case.call.value_in_key:
            tensors.append(self.pool.value(0))
        return tensors

    def _check_cache(self, before: list[Tensor], batch: ForwardBatch) -> None:
        """New tokens lie in their slots; nothing else changed but page 0."""
        slots = batch.out_cache_loc.cpu().long()
        mine = slots[slots >= self.case.page_size]
        fresh = [p for p, _ in self.case.work.requests]
        wanted = [self._new_keys, self._new_values]
        for now, was, parts in zip(self._stored(), before, wanted, strict=False):
            stored = now.cpu()
            numbers = stored.float()
            rows = torch.cat([p[at:] for p, at in zip(parts, fresh, strict=True)])
            equal = numbers[mine] == rows.to(stored.dtype).float()
            require(bool(equal.all()), "new keys or values do not lie at out_cache_loc")
            other = torch.ones(len(stored), dtype=torch.bool)
            other[: self.case.page_size] = False
            other[mine] = False
            same = torch.equal(_bytes(stored)[other], _bytes(was.cpu())[other])
            require(same, "writes slots that belong to nobody in the pass, or to cached tokens")

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)


def spoil(storage: Tensor) -> None:
    """Fill with NaN, also where the dtype has one byte and no fill."""
    if storage.element_size() == 1:
        storage.view(torch.uint8).fill_(0x7F)
    else:
        storage.fill_(float("nan"))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
