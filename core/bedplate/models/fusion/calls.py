# SPDX-License-Identifier: Apache-2.0
"""What the small modules of a model are really called with, seen in one tiny forward.

Patterns are found by behaviour, never by class or attribute names, so that a model nobody
has heard of is treated like any other.
"""

from __future__ import annotations

__all__ = ["Call", "observe", "trial_forward"]

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

TRIAL_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of one childless module.

    Attributes:
        path: The module's path.
        module: The module.
        x: The very tensor object it was given first; kept alive, so identity means something.
        version: How often ``x`` had been changed in place by then.
        alone: Whether it was given nothing else.
    """

    path: str
    module: nn.Module
    x: Tensor
    version: int
    alone: bool


def trial_forward(module: nn.Module) -> Tensor:
    """Logits ``[1, 8, V]`` of eight different tokens, without a cache.

    For a module whose attention runs by itself; a caller whose attention needs a step context
    passes its own function.
    """
    device = next(module.parameters()).device
    config: Any = module.config
    count = config.get_text_config().vocab_size
    # 1 upwards: token 0 is padding in many models and may be masked.
    ids = torch.arange(1, TRIAL_TOKENS + 1, device=device)[None] % count
    logits: Tensor = module(input_ids=ids, use_cache=False).logits
    return logits


def observe(
    module: nn.Module, run: Callable[[nn.Module], Tensor]
) -> tuple[Tensor, tuple[Call, ...]]:
    """Run once and record the calls of all childless modules, in order.

    Returns:
        What ``run`` returned, and the calls.

    Raises:
        Exception: Whatever ``run`` raises.
    """
    calls: list[Call] = []
    paths = {part: path for path, part in module.named_modules() if not any(part.children())}

    def record(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args and isinstance(args[0], Tensor):
            x = args[0]
            alone = len(args) == 1 and not kwargs
            calls.append(
                Call(path=paths[part], module=part, x=x, version=x._version, alone=alone)
            )

    handles = [part.register_forward_pre_hook(record, with_kwargs=True) for part in paths]
    try:
        # Not inference mode: its tensors count no versions.
        with torch.no_grad():
            output = run(module)
    finally:
        for handle in handles:
            handle.remove()
    return output, tuple(calls)
