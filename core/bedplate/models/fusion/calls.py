# SPDX-License-Identifier: Apache-2.0
"""What the modules of a model are really called with, seen in one tiny forward.

Patterns are found by behaviour, never by class or attribute names, so that a model nobody
has heard of is treated like any other.
"""

from __future__ import annotations

__all__ = ["Call", "observe", "trial_forward"]

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TRIAL_TOKENS = 8


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """One call of one module.

    Attributes:
        path: The module's path.
        module: The module.
        leaf: Whether it has no children.
        args: Its positional arguments; the very objects, so identity means something.
        kwargs: Its keywords, likewise.
        x: The first argument, if that is a tensor; else the keyword ``hidden_states``.
        version: How often ``x`` had been changed in place by then.
        output: What it returned; set when it has.
    """

    path: str
    module: nn.Module
    leaf: bool
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    x: Tensor
    version: int
    output: Any = field(default=None)

    @property
    def alone(self) -> bool:
        """Whether it was given nothing but ``x``, by position."""
        return len(self.args) == 1 and not self.kwargs

    @property
    def result(self) -> Tensor | None:
        """The tensor that it returned: the output, or the first of a tuple's."""
        first = self.output[0] if isinstance(self.output, tuple) else self.output
        return first if isinstance(first, Tensor) else None


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
    """Run once and record the calls of all modules inside, in the order in which they begin.

    Returns:
        What ``run`` returned, and the calls.

    Raises:
        Exception: Whatever ``run`` raises.
    """
    calls: list[Call] = []
    open_calls: dict[nn.Module, list[Call | None]] = {}
    paths = {part: path for path, part in module.named_modules() if path}

    def begin(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        call = None
        if isinstance(x, Tensor):
            call = Call(
                path=paths[part], module=part, leaf=not any(part.children()), args=args,
                kwargs=kwargs, x=x, version=x._version,
            )  # fmt: skip
            calls.append(call)
        open_calls.setdefault(part, []).append(call)

    def end(part: nn.Module, _args: Any, output: Any) -> None:
        call = open_calls[part].pop()
        if call is not None:
            call.output = output

    handles = []
    for part in paths:
        handles.append(part.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(part.register_forward_hook(end))
    try:
        # Not inference mode: its tensors count no versions.
        with torch.no_grad():
            output = run(module)
    finally:
        for handle in handles:
            handle.remove()
    return output, tuple(calls)
