# SPDX-License-Identifier: Apache-2.0
"""A model of full size that takes no memory and no time, for the probe to watch.

Its matrices exist on the meta device while it is built, and then as one number each, seen as
the full shape by strides of zero.  Products with such a matrix are not computed: their shape
comes from the meta device and their value is a constant.  Everything else (control flow,
masks, positions, routing) runs for real on the host, so that a forward may read values, which
pure meta tensors forbid.

A NaN in a token's row stays in that row through the products that are skipped, so the probe
can see which other tokens a token reaches.
"""

from __future__ import annotations

__all__ = ["HollowProducts", "hollow_model", "is_hollow"]

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LARGE_NUMEL = 1 << 14
"""Parameters of more elements than this are hollow."""
HOLLOW_VALUE = 0.01
"""Value of every skipped product; small enough that nothing overflows in many layers."""

_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}
_PRODUCTS: set[Callable[..., Any]] = {
    F.linear, F.embedding, F.conv1d, F.conv2d, F.conv3d, torch.matmul, torch.mm, torch.bmm,
    torch.addmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.__matmul__,
    Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.addmm,
}  # fmt: skip


def hollow_model(model_class: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """Build ``model_class(config)`` in float32, evaluation mode, without its weights.

    Small parameters are ones; buffers are real, unless they are large.
    """
    with _parameters_on_meta(), _LargeOnMeta():
        model = model_class(config)
    memo: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                shared = memo.setdefault(id(parameter), _hollow_parameter(parameter))
                module._parameters[name] = shared
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    return model.eval()


def is_hollow(value: object) -> bool:
    """Whether ``value`` is a tensor with less than one byte per element behind it."""
    return (
        isinstance(value, Tensor)
        and not value.is_meta
        and value.untyped_storage().nbytes() < value.numel()
    )


class HollowProducts(TorchFunctionMode):
    """Within this mode, products with a hollow operand are not computed."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Skip ``func`` if it is such a product, else run it."""
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            flat = pytree.tree_leaves((args, kwargs))
            if any(is_hollow(value) for value in flat):
                return _skip(func, args, kwargs, flat)
        return func(*args, **kwargs)


def _skip(func: Any, args: Any, kwargs: Any, flat: list[Any]) -> Tensor:
    on_meta = pytree.tree_map(
        lambda x: (
            torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x
        ),
        (args, kwargs),
    )
    shape = func(*on_meta[0], **on_meta[1])
    out = torch.full(shape.shape, HOLLOW_VALUE, dtype=shape.dtype)
    for operand in flat:
        if isinstance(operand, Tensor) and operand.is_floating_point():
            _carry_nan(operand, out)
    return out


def _carry_nan(operand: Tensor, out: Tensor) -> None:
    """Rows of ``out`` that ``operand`` spoils; all of it where rows do not correspond."""
    if is_hollow(operand) or not operand.isnan().any():
        return
    rows = operand.isnan().any(-1, keepdim=True)
    if rows.shape[:-1] == out.shape[:-1]:
        out.masked_fill_(rows, float("nan"))
    else:
        out.fill_(float("nan"))


def _hollow_parameter(parameter: nn.Parameter) -> nn.Parameter:
    shape, dtype = parameter.shape, parameter.dtype
    real = parameter.numel() <= LARGE_NUMEL
    data = torch.ones(shape, dtype=dtype) if real else torch.ones((), dtype=dtype).expand(shape)
    return nn.Parameter(data, requires_grad=False)


class _LargeOnMeta(TorchFunctionMode):
    """Factory calls for large tensors make them on the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and kwargs.get("device") is None:
            on_meta = func(*args, **{**kwargs, "device": "meta"})
            if on_meta.numel() > LARGE_NUMEL:
                return on_meta
        return func(*args, **kwargs)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module registers moves to the meta device at once."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            kept = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
            kept.__dict__.update(param.__dict__)
            param = kept
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
