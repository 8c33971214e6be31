# SPDX-License-Identifier: Apache-2.0
"""Attention over the paged cache on AMD devices: the neutral kernels, and AITER's."""

from __future__ import annotations

__all__ = ["TritonAttention", "providers"]

from bedplate.contract import AttentionBuild, AttentionProvider, AttentionRequest, Support
from bedplate_rocm import aiter_attention
from bedplate_rocm.architectures import find
from bedplate_rocm.ops import device_features
from bedplate_triton.attention import PagedAttention, supports


class TritonAttention(PagedAttention):
    """The neutral kernels on the current device.

    Args:
        build: Pools, table and limits.
    """

    def __init__(self, build: AttentionBuild) -> None:
        super().__init__(build, device_features())


def providers() -> tuple[AttentionProvider, ...]:
    """What this backend offers; AITER says for itself why it cannot be used."""
    triton = AttentionProvider(
        name="triton",
        provider="rocm",
        priority=100,
        supports=_supports,
        build=TritonAttention,
        determinism="batch_invariant",
    )
    return triton, aiter_attention.provider


def _supports(request: AttentionRequest) -> Support:
    found = find(request.arch)
    return supports(request, found.narrow if found else ())
