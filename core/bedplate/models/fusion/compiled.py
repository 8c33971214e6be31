# SPDX-License-Identifier: Apache-2.0
"""The whole model by torch's compiler, in place of all other forms; only when asked for.

Attention calls stay outside what is compiled (see ``models.bridge``).  Token counts are
symbols, so one compile serves passes of every length.
"""

from __future__ import annotations

__all__ = ["CompiledModel"]

from typing import TYPE_CHECKING, Any

import torch

from bedplate.contract import OpRequest, Support
from bedplate.models.fusion.site import Evidence, Shadow, Site

if TYPE_CHECKING:
    from torch import nn

    from bedplate.models.fusion.site import Providers


class CompiledModel(Site):
    """One model.

    Args:
        module: The whole of it.
    """

    pattern = "compiled"
    path = "model"
    kind = "compiled"

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._forward: Any = None

    def requests(self) -> tuple[OpRequest, ...]:
        """None: the compiler makes its own kernels."""
        return ()

    def pays(self, providers: Providers) -> Support:
        """Nobody knows before; so it must be asked for."""
        return Support.yes("asked for")

    def verify(self, providers: Providers) -> Evidence:
        """Have the compiler take the model at its next pass, which the whole check makes."""
        self._forward = torch.compile(self._module.forward, dynamic=True)
        return Evidence(ok=True, text="compared as a whole")

    def apply(self) -> None:
        """Shadow the model."""
        Shadow(self._forward).put(self._module)

    def revert(self) -> None:
        """Uncover the model."""
        Shadow.remove(self._module)
