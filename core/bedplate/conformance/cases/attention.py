# SPDX-License-Identifier: Apache-2.0
"""Cases of attention: kinds of call, kinds of pass, and which requests are in it."""

from __future__ import annotations

__all__ = ["CALLS", "DTYPES", "MAX_CONTEXT_LEN", "PASSES", "AttentionCase", "Pass", "cases_for"]

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bedplate.batch.forward_mode import ForwardMode
from bedplate.contract.attention import AttentionCallSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bedplate.contract.capabilities import BackendCapabilities

_PLAIN = AttentionCallSpec(
    call_id=0, module="attn", num_heads=6, num_kv_heads=2, head_dim=16, value_dim=16, scale=0.3
)
CALLS = {
    "plain": _PLAIN,
    "one_head_each": replace(_PLAIN, num_heads=2),
    "one_key": replace(_PLAIN, num_heads=8, num_kv_heads=1),
    "heads_of_64": replace(_PLAIN, num_heads=7, num_kv_heads=1, head_dim=64, value_dim=64),
    "heads_of_128": replace(_PLAIN, num_heads=4, head_dim=128, value_dim=128, scale=0.09),
    "heads_of_80": replace(_PLAIN, head_dim=80, value_dim=80, scale=0.11),
    "odd_sizes": replace(_PLAIN, head_dim=24, value_dim=40),
    "scale": replace(_PLAIN, scale=1.0),
    "window": replace(_PLAIN, window=5),
    "wide_window": replace(_PLAIN, window=33),
    "chunk": replace(_PLAIN, chunk=8),
    "window_in_chunk": replace(_PLAIN, chunk=32, window=20),
    "softcap": replace(_PLAIN, softcap=1.5),
    "sinks": replace(_PLAIN, sinks=True),
    "sinks_and_window": replace(_PLAIN, sinks=True, window=11),
    "latent": replace(
        _PLAIN, num_heads=8, num_kv_heads=1, head_dim=40, value_dim=32, value_in_key=True
    ),
    "both_ways": replace(_PLAIN, causal=False),
    "sinks_of_64": replace(_PLAIN, num_heads=4, head_dim=64, value_dim=64, sinks=True),
    "latent_of_512": replace(
        _PLAIN,
        num_heads=6,
        num_kv_heads=1,
        head_dim=576,
        value_dim=512,
        scale=0.07,
        value_in_key=True,
    ),
}
"""Kinds of call, small enough for any machine."""

Requests = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One forward pass.

    Attributes:
        mode: Its kind.
        requests: (cached tokens, new tokens) of each.
        padding: Rows of padding behind them: request row 0, slot 0, the fill length.
        shared: Cached tokens that the second request has in common with the first.
    """

    mode: ForwardMode
    requests: Requests
    padding: int = 0
    shared: int = 0


PASSES = {
    "prefill": Pass(mode=ForwardMode.EXTEND, requests=((0, 3), (0, 33), (0, 1), (0, 16))),
    "chunked": Pass(mode=ForwardMode.EXTEND, requests=((16, 17), (1, 2), (40, 5), (15, 1))),
    "shared": Pass(mode=ForwardMode.EXTEND, requests=((32, 7), (32, 3)), shared=32),
    "decode": Pass(
        mode=ForwardMode.DECODE, requests=((0, 1), (15, 1), (16, 1), (69, 1), (30, 1))
    ),
    "decode_one": Pass(mode=ForwardMode.DECODE, requests=((47, 1),)),
    "decode_padded": Pass(mode=ForwardMode.DECODE, requests=((20, 1), (3, 1)), padding=2),
    "mixed": Pass(mode=ForwardMode.MIXED, requests=((31, 1), (0, 21), (64, 1), (8, 9))),
    "verify": Pass(mode=ForwardMode.TARGET_VERIFY, requests=((17, 4), (31, 4), (2, 4))),
    "full": Pass(mode=ForwardMode.DECODE, requests=((95, 1), (94, 1))),
}  # fmt: skip
"""Kinds of pass; lengths lie on, before and behind the borders of pages of 16."""

MAX_CONTEXT_LEN = 96
DTYPES = ("float32", "float16", "bfloat16")
"""From the finest to the coarsest: the finer, the smaller the mistakes that show."""
_ERRORS = {"float32": 1e-5, "bfloat16": 1.2e-2, "float16": 2e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """One call in one pass over one cache.

    Attributes:
        name: What is special about it; without slashes and blanks.
        call: The call.
        work: The pass.
        dtype: Name of the model's dtype.
        kv_dtype: Name of the cache's dtype.
        page_size: Tokens a page.
    """

    name: str
    call: AttentionCallSpec
    work: Pass
    dtype: str
    kv_dtype: str
    page_size: int

    def harmless(self, capabilities: BackendCapabilities, dtype: str) -> bool:
        """Whether an implementation that refuses the case may be tried all the same.

        Only where the refusal is about which scores count and how: a kernel that is wrong
        about dtypes, sizes or pages reads foreign memory and takes the process with it.

        Args:
            capabilities: The backend's.
            dtype: One that the implementation reads.
        """
        marks = {"window": None, "chunk": None, "softcap": None, "sinks": False, "causal": True}
        plain = replace(self.call, **marks, scale=_PLAIN.scale)  # type: ignore[arg-type]
        known = self.page_size in capabilities.memory.page_sizes
        return plain == _PLAIN and known and self.dtype == self.kv_dtype == dtype

    @property
    def tolerance(self) -> float:
        """Largest relative error.

        With a narrower cache it is the cache's: new keys and values may be read before or
        after they were rounded.
        """
        return max(_ERRORS.get(self.dtype, 0.1), _ERRORS.get(self.kv_dtype, 0.1))


def cases_for(
    capabilities: BackendCapabilities, dtype: str = "float32"
) -> Iterator[AttentionCase]:
    """Every kind of call in every kind of pass; then every page size and every dtype.

    Those that a backend does not declare are among them, for the sake of honesty.

    Args:
        capabilities: The backend's.
        dtype: Of model and cache, where a case is about something else.
    """
    page = capabilities.memory.page_sizes[0]
    base = {"dtype": dtype, "kv_dtype": dtype, "page_size": page}
    for kind, call in CALLS.items():
        for name, work in PASSES.items():
            yield AttentionCase(name=f"{kind}.{name}", call=call, work=work, **base)  # type: ignore[arg-type]
    call = CALLS["wide_window"]
    for size in dict.fromkeys((*capabilities.memory.page_sizes, 1, 16, 64)):
        for name in ("chunked", "decode", "mixed"):
            yield AttentionCase(
                name=f"page_of_{size}.{name}", call=call, work=PASSES[name],
                **(base | {"page_size": size}),  # type: ignore[arg-type]
            )  # fmt: skip
    dtypes = dict.fromkeys((*capabilities.compute_dtypes, *DTYPES))
    kinds = dict.fromkeys(
        [(dtype, dtype) for dtype in dtypes]
        + [(capabilities.compute_dtypes[0], kv) for kv in capabilities.kv_dtypes]
    )
    for dtype, kv_dtype in kinds:
        for name in ("prefill", "chunked", "decode"):
            yield AttentionCase(
                name=f"{dtype}_over_{kv_dtype}.{name}", call=CALLS["heads_of_64"],
                work=PASSES[name], dtype=dtype, kv_dtype=kv_dtype, page_size=page,
            )  # fmt: skip
