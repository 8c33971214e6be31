# SPDX-License-Identifier: Apache-2.0
"""Attention as the core sees it: what a model calls, and what a backend answers.

A model is described by the list of attention calls that it *really makes*, observed once on
the meta device (``models.probe``).  KV pools are built from that list, and every call reaches
the backend with its ``AttentionCallSpec``.

Shapes: T new tokens, B requests, H query heads, K key/value heads, D head size, Dv value size.
"""

from __future__ import annotations

__all__ = [
    "AttentionBackend",
    "AttentionBuild",
    "AttentionCallSpec",
    "AttentionProvider",
    "AttentionRequest",
]

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.contract.capabilities import DeterminismClass
    from bedplate.contract.decisions import Support
    from bedplate.contract.memory import KVPool
    from bedplate.contract.runtime import DeviceRuntime


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCallSpec:
    """One attention call of one forward pass; identity is (module, ordinal).

    Attributes:
        call_id: Dense number in order of observation; index into the KV pool.
        module: Dotted path of the attention module.
        ordinal: Which call of that module within one forward (some call twice).
        num_heads: H.
        num_kv_heads: K, not repeated.
        head_dim: D, of queries and keys.
        value_dim: Dv.
        scale: Multiplier of the scores; always given, never derived from D.
        causal: Whether a token sees later ones.
        window: A query at position p sees keys at positions > p − window; ``None`` = all.
        chunk: A query sees only keys of its own chunk, ``position // chunk``.
        softcap: Scores become ``softcap · tanh(scores / softcap)``.
        sinks: A learnable logit per head joins the softmax and is then dropped.
        value_in_key: V is the first Dv columns of K and is not stored (latent attention).
        alias_of: ``call_id`` whose keys and values this call reads again; it stores none.
    """

    call_id: int
    module: str
    ordinal: int = 0
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False
    value_in_key: bool = False
    alias_of: int | None = None

    @property
    def cache_id(self) -> int:
        """The call whose stored keys and values this one attends to."""
        return self.call_id if self.alias_of is None else self.alias_of


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRequest:
    """What an attention provider is asked to support, all calls of a model together.

    Attributes:
        calls: Every call that the model makes.
        dtype: Name of the model's torch dtype.
        kv_dtype: Name of the cache's torch dtype.
        page_size: Tokens a page.
        arch: The device's architecture word.
        deterministic: Whether rows must not depend on the rest of their pass; only providers
            that promise ``batch_invariant`` are asked then.
    """

    calls: tuple[AttentionCallSpec, ...]
    dtype: str
    kv_dtype: str
    page_size: int
    arch: str = ""
    deterministic: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBuild:
    """What an attention backend is built from, after the pools exist.

    Attributes:
        runtime: The activated device.
        calls: Every call that the model makes.
        kv_pool: Storage, indexed by ``call_id``.
        req_to_token: ``[max_reqs, max_context_len]`` int32 on the device; slot of each token.
        page_size: Tokens a page.
        dtype: The model's dtype.
        max_batch_size: Most requests one pass may hold.
        max_context_len: Most tokens one request may hold.
        deterministic: As in the request.
    """

    runtime: DeviceRuntime
    calls: tuple[AttentionCallSpec, ...]
    kv_pool: KVPool
    req_to_token: Tensor
    page_size: int
    dtype: torch.dtype
    max_batch_size: int
    max_context_len: int
    deterministic: bool = False


class AttentionBackend(ABC):
    """Attention over the paged cache of one model.

    Per forward the core calls ``prepare`` (outside a graph; may use the host mirrors in the
    batch, may allocate), then ``prepare_in_graph`` (recordable; static shapes only), then
    ``forward`` once per attention call.
    """

    seq_len_fill_value: int = 1
    """Length that padding rows of a graph get; their slot is 0 and their row is 0."""
    extend_recordable: bool = False
    """Whether a recorded extend pass serves every batch of at most as many tokens and requests:
    lengths are read on the device, and what is baked in suits the longest that fits."""

    @abstractmethod
    def prepare(self, batch: ForwardBatch) -> None:
        """Make the metadata of ``batch`` on the host's side. Required.

        Called once per eager forward and once per replay, never for an empty batch.
        In a graph's replay ``batch`` is the padded batch over the static slots.
        """

    def prepare_in_graph(self, batch: ForwardBatch) -> None:  # noqa: B027 - optional
        """Make the part of the metadata that a graph can record. Optional; does nothing.

        Must not allocate outside the graph's pool, synchronise or read the host.
        """

    def padded_tokens(self, batch: ForwardBatch) -> int:
        """How many rows an eager pass with several new tokens should have. Optional.

        Without it the batch stays as it is.  Called before ``prepare``, unless all logits or
        hidden states are wanted.  If it is more than the batch has, rows of padding follow its
        tokens: token 0 at position 0, whose keys and values go to slot 0.  What is returned
        for them must be finite, as the next layer reads it.
        """
        return batch.num_tokens

    def graph_key(self, batch: ForwardBatch) -> tuple[int, ...]:
        """Python integers that reach kernels in a graph and vary with the batch. Optional.

        A graph is replayed only for batches whose integers equal those of its capture; called
        once or twice per step with the unpadded batch, so it must be quick.
        """
        return ()

    @abstractmethod
    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        call: AttentionCallSpec,
        batch: ForwardBatch,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Store new keys and values, then attend; several new tokens per request. Required.

        Args:
            q: ``[T, H, D]``; strides are free except the last.
            k: ``[T, K, D]`` or ``None`` when the call stores nothing.
            v: ``[T, K, Dv]``; ``None`` if ``call.value_in_key`` or nothing is stored.
            call: The call's description.
            batch: The prepared batch; rows of padding are ignored.
            sinks: ``[H]`` logits when ``call.sinks``.

        Returns:
            ``[T, H, Dv]`` in the dtype of ``q``; valid until the next call.
        """

    @abstractmethod
    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        call: AttentionCallSpec,
        batch: ForwardBatch,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As ``forward_extend`` with exactly one new token per request. Required.

        May be recorded in a graph: must not allocate outside its pool nor synchronise.
        """

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        call: AttentionCallSpec,
        batch: ForwardBatch,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Dispatch by mode; an idle batch yields an empty result. Not overridden."""
        if batch.mode.is_idle():
            return q.new_empty((q.shape[0], call.num_heads, call.value_dim))
        if batch.mode.is_decode():
            return self.forward_decode(q, k, v, call, batch, sinks=sinks)
        return self.forward_extend(q, k, v, call, batch, sinks=sinks)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProvider:
    """One attention implementation on offer.

    Attributes:
        name: Value of ``--attention``.
        provider: Plugin that brings it.
        priority: Higher is preferred among those that support the request.
        supports: Whether a request can be served correctly; must be honest both ways.
        build: Makes the backend once pools exist.
        determinism: Strongest promise that it keeps when asked to.
        modes: ``all`` or ``decode`` / ``extend`` only (a hybrid pair is then chosen).
    """

    name: str
    provider: str
    priority: int
    supports: Callable[[AttentionRequest], Support]
    build: Callable[[AttentionBuild], AttentionBackend]
    determinism: DeterminismClass = "run_to_run"
    modes: Literal["all", "decode", "extend"] = "all"
