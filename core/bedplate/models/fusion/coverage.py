# SPDX-License-Identifier: Apache-2.0
"""Which parts of a model still run as torch computes them, after fusion.

A promise about bits holds only if every sum over features is made by an operation that keeps
it.  Looking rows up and adding them does not sum, so embeddings keep it by themselves; so does
``nn.LayerNorm``, which torch computes row by row.
"""

from __future__ import annotations

__all__ = ["require_coverage", "uncovered"]

from torch import nn

from bedplate.errors import UnsupportedModelError

_SAFE = (nn.Embedding, nn.LayerNorm)


def uncovered(module: nn.Module) -> list[str]:
    """Paths of modules with parameters of their own that no operation stands in for."""
    fused = [path for path, part in module.named_modules() if "forward" in vars(part)]
    return [
        path
        for path, part in module.named_modules()
        if any(True for _ in part.parameters(recurse=False))
        and not isinstance(part, _SAFE)
        and not any(path == above or path.startswith(f"{above}.") for above in fused if above)
    ]


def require_coverage(module: nn.Module) -> None:
    """Refuse to promise bits for a model of which some part is computed otherwise.

    Raises:
        UnsupportedModelError: Names the first of them.
    """
    rest = uncovered(module)
    if rest:
        shown = ", ".join(rest[:3]) + (f" and {len(rest) - 3} more" if len(rest) > 3 else "")
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be deterministic: {shown} of it run as torch "
            "computes them, whose bits depend on the batch. Run it without --deterministic, "
            "or choose another model",
            architecture=type(module).__name__,
            reason=shown,
        )
