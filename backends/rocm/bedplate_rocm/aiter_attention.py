# SPDX-License-Identifier: Apache-2.0
"""Attention by AMD's operator library AITER, where it is installed and has what is called.

The library is no requirement and has no place in an extra: its distribution is ``amd-aiter``
and comes from AMD's releases, while the package index knows another project by the name
``aiter``.  So its function is looked for, its parameters are read, and what is missing is the
reason of a refusal.  Nobody has run this on a device yet; hence it is chosen only by name
(``--attention aiter``).

Shapes: B requests, P pages of a request at most, K key/value heads, D head size.
"""

from __future__ import annotations

__all__ = ["AiterAttention", "find_function", "provider"]

import inspect
from functools import lru_cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bedplate.contract import (
    AttentionBuild,
    AttentionCallSpec,
    AttentionProvider,
    AttentionRequest,
    Support,
)
from bedplate_rocm.ops import device_features
from bedplate_triton.attention import PagedAttention

if TYPE_CHECKING:
    from collections.abc import Callable

    from bedplate.batch.forward_batch import ForwardBatch

_DISTRIBUTION = "amd-aiter"
_MODULE = "aiter.ops.triton.attention.unified_attention"
_FUNCTION = "unified_attention"
_ARCHITECTURES = ("gfx942", "gfx950")
_PARAMETERS = frozenset(
    {
        "q", "k", "v", "out", "cu_seqlens_q", "max_seqlen_q", "seqused_k", "max_seqlen_k",
        "softmax_scale", "causal", "window_size", "block_table", "softcap", "q_descale",
        "k_descale", "v_descale",
    }
)  # fmt: skip
_LEAST_PAGE = 16


class AiterAttention(PagedAttention):
    """Paged attention by one function of the library, decode and prompts alike.

    Args:
        build: Pools, table and limits.
    """

    def __init__(self, build: AttentionBuild) -> None:
        super().__init__(build, device_features())
        function = find_function()
        assert callable(function)  # ``supports`` says so before
        self._function: Callable[..., Any] = function
        self._page = build.page_size
        self._longest = build.max_context_len
        device = build.req_to_token.device
        self._counts = torch.arange(build.max_batch_size + 1, dtype=torch.int32, device=device)
        self._table = build.req_to_token
        self._starts = self._counts
        self._pages = self._table[:0]

    def prepare_in_graph(self, batch: ForwardBatch) -> None:
        """``[B, P]`` pages of the requests, and ``[B + 1]`` ends of their new tokens."""
        self._pages = self._table[:, :: self._page][batch.req_pool_indices] // self._page
        if batch.extend is None:
            self._starts = self._counts[: batch.batch_size + 1]
        else:
            starts, counts = batch.extend.start_loc, batch.extend.seq_lens
            self._starts = torch.cat((starts, starts[-1:] + counts[-1:]))

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
        """Write, then one call of the library."""
        return self._attend(q, k, v, call, batch, 1)

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
        """Write, then one call of the library for all requests."""
        assert batch.extend is not None  # the mode says so
        return self._attend(q, k, v, call, batch, int(batch.extend.seq_lens_cpu.max()))

    def _attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        call: AttentionCallSpec,
        batch: ForwardBatch,
        longest: int,
    ) -> Tensor:
        keys, values = self.store(k, v, call, batch)
        out = q.new_empty((q.shape[0], call.num_heads, call.value_dim))
        # The library's window counts what lies before a token, ours the token too.
        window = (-1, -1) if call.window is None else (call.window - 1, 0)
        self._function(
            q=q.contiguous(), k=self._paged(keys), v=self._paged(values), out=out,
            cu_seqlens_q=self._starts, max_seqlen_q=longest, seqused_k=batch.seq_lens,
            max_seqlen_k=self._longest, softmax_scale=call.scale, causal=True,
            window_size=window, block_table=self._pages, softcap=call.softcap or 0.0,
            q_descale=None, k_descale=None, v_descale=None,
        )  # fmt: skip
        return out

    def _paged(self, pool: Tensor) -> Tensor:
        """``[slots, K, D]`` as ``[pages, page, K, D]``; a view."""
        return pool.view(-1, self._page, *pool.shape[1:])


@lru_cache(maxsize=1)
def find_function() -> Callable[..., Any] | str:
    """The library's function, or why it cannot be used."""
    try:
        version = metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return f"{_DISTRIBUTION} is not installed (the project 'aiter' is something else)"
    try:
        function = getattr(import_module(_MODULE), _FUNCTION)
        missing = _PARAMETERS - inspect.signature(function).parameters.keys()
    except Exception as error:  # a library that builds itself when imported fails in many ways
        cause = str(error).partition("\n")[0]
        return f"{_DISTRIBUTION} {version} cannot be loaded: {type(error).__name__}: {cause}"
    if missing:
        names = ", ".join(sorted(missing))
        return f"{_FUNCTION} of {_DISTRIBUTION} {version} does not take {names}"
    found: Callable[..., Any] = function
    return found


def _supports(request: AttentionRequest) -> Support:
    if request.arch not in _ARCHITECTURES:
        return Support.no(f"the library serves {' and '.join(_ARCHITECTURES)}")
    if request.page_size < _LEAST_PAGE:
        return Support.no(f"the library wants pages of {_LEAST_PAGE} tokens at least")
    if request.kv_dtype != request.dtype or request.dtype == "float32":
        return Support.no("only for a cache in the model's own dtype of sixteen bits")
    for call in request.calls:
        if problem := _problem(call):
            return Support.no(f"{call.module} {problem}")
    found = find_function()
    if isinstance(found, str):
        return Support.no(found)
    return Support.yes("AMD's kernels; not yet run here, so chosen by name only")


def _problem(call: AttentionCallSpec) -> str:
    """What the library has no form for; empty if nothing."""
    if not call.causal:
        return "sees later tokens"
    if call.sinks or call.chunk is not None or call.value_in_key:
        return "has sinks, chunks or values inside its keys"
    if call.head_dim != call.value_dim:
        return "has keys and values of different sizes"
    return ""


provider = AttentionProvider(
    name="aiter", provider="rocm", priority=50, supports=_supports, build=AiterAttention
)
"""On offer after the neutral kernels."""
