# SPDX-License-Identifier: Apache-2.0
"""Latent attention kept latent: the cache holds what the model compressed.

Modules with latent attention expand their compressed keys and values in one method,
``expand_kv(latent, rope_key)``, right before the attention call.  Shadowing that method on
the instance with the identity makes the interface receive the compressed tensors.  The
matrix of the expansion, ``kv_b_proj``, is then applied to the queries and to the result
instead: one shared key/value head of ``rank + rope`` columns, whose first ``rank`` are V.

The matrices are views of the live weight, read in every call: nothing is derived, so
nothing has to be refreshed when weights change.

Shapes: T tokens, H heads, N = per-head key size without rotation, R = rotated part,
L = rank of the latent, V = value size per head.
"""

from __future__ import annotations

__all__ = [
    "absorb",
    "absorbs",
    "expand",
    "is_kept",
    "keep_latent",
    "latent_keys",
    "latent_modules",
    "value_size",
]

import torch
from torch import Tensor, nn


def latent_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that expand a latent by one bias-free linear layer, by their path."""
    return {name: m for name, m in model.named_modules() if _has_expansion(m)}


def _has_expansion(module: nn.Module) -> bool:
    linear = getattr(module, "kv_b_proj", None)
    expansion = getattr(type(module), "expand_kv", None)
    return expansion is not None and isinstance(linear, nn.Linear) and linear.bias is None


def keep_latent(module: nn.Module) -> None:
    """Let the interface receive the latent and the rotated key of ``module``."""
    module.__dict__["expand_kv"] = _identity


def is_kept(module: nn.Module) -> bool:
    """Whether ``keep_latent`` was called on ``module``."""
    return module.__dict__.get("expand_kv") is _identity


def value_size(module: nn.Module, num_heads: int, nope_size: int) -> int:
    """V: columns of one head's value after the expansion."""
    return _per_head(module, num_heads).shape[1] - nope_size


def _identity(latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor]:
    return latent, rope_key


def latent_keys(latent: Tensor, rope_key: Tensor) -> Tensor:
    """What the cache stores: ``[T, 1, L]`` and ``[T, 1, R]`` → ``[T, 1, L + R]``."""
    return torch.cat((latent, rope_key), dim=-1)


def absorb(module: nn.Module, query: Tensor, rope_size: int) -> Tensor:
    """Queries against the latent: ``[T, H, N + R]`` → ``[T, H, L + R]``."""
    nope = query.shape[-1] - rope_size
    weight = _per_head(module, query.shape[1])[:, :nope]  # [H, N, L]
    projected = torch.bmm(query[..., :nope].transpose(0, 1), weight).transpose(0, 1)
    return torch.cat((projected, query[..., nope:]), dim=-1)


def expand(module: nn.Module, latent_out: Tensor, nope_size: int) -> Tensor:
    """Attended latents to values: ``[T, H, L]`` → ``[T, H, V]``."""
    weight = _per_head(module, latent_out.shape[1])[:, nope_size:]  # [H, V, L]
    return torch.bmm(latent_out.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)


def _per_head(module: nn.Module, num_heads: int) -> Tensor:
    weight: Tensor = module.kv_b_proj.weight  # type: ignore[union-attr, assignment]
    return weight.view(num_heads, -1, weight.shape[-1])


@torch.no_grad()
def absorbs(module: nn.Module, num_heads: int, nope_size: int, rope_size: int) -> bool:
    """Whether the module's own ``expand_kv`` is the expansion that is absorbed here.

    Decided by numbers: scores and values of two random tokens, both ways, with a random
    weight in place of the module's own (which is put back).
    """
    linear: nn.Linear = module.kv_b_proj  # type: ignore[assignment]
    held = linear._parameters["weight"]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(linear.weight.shape, generator=generator) * linear.in_features**-0.5
    linear._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    try:
        return _agrees(module, num_heads, nope_size, rope_size, generator)
    finally:
        linear._parameters["weight"] = held


def _agrees(
    module: nn.Module, num_heads: int, nope_size: int, rope_size: int, chance: torch.Generator
) -> bool:
    rank = module.kv_b_proj.in_features  # type: ignore[union-attr]
    latent = torch.randn(1, 1, 2, rank, generator=chance)  # type: ignore[arg-type]
    rope = torch.randn(1, 1, 2, rope_size, generator=chance)
    query = torch.randn(2, num_heads, nope_size + rope_size, generator=chance)
    key, value = type(module).expand_kv(module, latent, rope)  # type: ignore[attr-defined]
    own = torch.einsum("nhd,hld->hnl", query, key[0])
    stored = latent_keys(latent[0].transpose(0, 1), rope[0].transpose(0, 1))
    ours = torch.einsum("nhd,lkd->hnl", absorb(module, query, rope_size), stored)
    values = expand(module, latent[0].transpose(0, 1).expand(-1, num_heads, -1), nope_size)
    pairs = ((own, ours), (value[0].transpose(0, 1), values))
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in pairs)
