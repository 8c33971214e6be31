# SPDX-License-Identifier: Apache-2.0
"""Made-up weights that need no file: the same for the same name and seed, on every rank.

For timings, memory tests and start-up checks.  A source like the others, so that it takes
the same way into the storage.
"""

from __future__ import annotations

__all__ = ["DummySource"]

import hashlib

import torch
from torch import Tensor, nn

from bedplate.models.weights.sources import TensorInfo

STD = 0.02
# Longer tensors repeat this many values; a prime, so that no two rows come out alike.
BLOCK = 1_048_573


class DummySource:
    """Values for every parameter: normal with deviation 0.02, norm weights 1.

    Buffers are left out: they keep what their constructors computed.

    Args:
        module: Whose parameters; only their names, shapes and owners matter.
        seed: Together with the name it decides the values.
        device: Where tensors are made; the values are the same everywhere.
    """

    def __init__(
        self, module: nn.Module, *, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        self._module = module
        self._seed = seed
        self._device = device
        self.infos: dict[str, TensorInfo] = {
            name: TensorInfo(
                name=name, shape=tuple(value.shape), dtype=value.dtype, origin="dummy"
            )
            for name, value in module.named_parameters()
        }

    def read(self, name: str) -> Tensor:
        """The tensor of that name, made anew; only one block of numbers comes from the host."""
        info = self.infos[name]
        if not info.dtype.is_floating_point:
            return torch.zeros(info.shape, dtype=info.dtype)
        if self._is_norm_weight(info):
            return torch.ones(info.shape, dtype=info.dtype)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(
            int.from_bytes(digest[:8], "big", signed=True)
        )
        count = torch.Size(info.shape).numel()
        block = torch.randn(min(count, BLOCK), generator=generator).mul_(STD).to(info.dtype)
        block = block.to(self._device)
        repeats = -(-count // max(block.numel(), 1))
        return block.repeat(repeats)[:count].view(info.shape)

    def _is_norm_weight(self, info: TensorInfo) -> bool:
        path, _, leaf = info.name.rpartition(".")
        kind = type(self._module.get_submodule(path)).__name__.lower()
        return "norm" in kind and "bias" not in leaf and len(info.shape) == 1
