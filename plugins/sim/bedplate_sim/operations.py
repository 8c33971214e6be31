# SPDX-License-Identifier: Apache-2.0
"""Operations of torch on the simulated device: each is work that is queued.

``install`` makes torch's device for outsiders, ``privateuseone``, ours in this process.  Views
are made at once, since they touch no memory; shapes of results come from torch's meta device;
what needs values on the host waits for them.
"""

from __future__ import annotations

__all__ = ["dispatch", "install", "kernel"]

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bedplate.errors import BackendUnavailableError, UnsupportedError
from bedplate_sim.allocator import poison
from bedplate_sim.tensor import DEVICE_TYPE, SimTensor, devices, plain, tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from bedplate_sim.allocator import Block
    from bedplate_sim.device import Device

_CPU = torch.device("cpu")
_META = torch.device("meta")
_FACTORIES = ("empty.memory_format", "empty_strided", "arange", "arange.start",
              "arange.start_step", "copy_")  # fmt: skip
"""Operations that torch may ask the device for without a tensor of ours."""
_MOST_SHAPES = 1 << 14
_library: list[torch.library.Library] = []


class _Form(NamedTuple):
    """What torch's schema says of an operation."""

    name: str
    view: bool
    fresh: bool
    unsized: bool
    reshapes: bool
    given: tuple[str, ...]
    writes: tuple[tuple[int, str], ...]


@cache
def _form(func: Any) -> _Form:
    schema = func._schema
    writes = tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    base = schema.name.partition("::")[2]
    return _Form(
        name=str(func),
        view=func.is_view,
        fresh=base.startswith(("empty", "new_empty")),
        unsized=torch.Tag.data_dependent_output in func.tags,
        reshapes=torch.Tag.inplace_view in func.tags,
        given=tuple(argument.name for argument in schema.arguments if argument.is_out),
        writes=writes,
    )


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation of torch on tensors of the device.

    Raises:
        UnsupportedError: It changes a shape in place, or mixes devices.
        CaptureError: It reads values, and a graph is captured.
    """
    form = _form(func)
    tensors = list(tensors_in((args, kwargs)))
    device = _device(tensors, kwargs)
    if form.reshapes:
        raise UnsupportedError(f"{form.name} changes a tensor's shape in place: not simulated")
    if form.view:
        owner = next(tensor for tensor in tensors if isinstance(tensor, SimTensor))
        result = func(*_map(_backing, args), **_map(_backing, kwargs))
        return _map(lambda real: SimTensor(real, owner.memory, device.torch_device), result)
    if func is torch.ops.aten.copy_.default:
        return _copy(device, *args, **kwargs)
    if func is torch.ops.aten._to_copy.default and _target(kwargs).type == "cpu":
        return _to_host(device, form.name, args[0], kwargs)
    _refuse_mixture(device, form, tensors)
    written = [_argument(args, kwargs, place, name) for place, name in form.writes]
    unsized, shapes = form.unsized, None
    if not unsized:
        try:
            shapes = _shapes(func, args, {**kwargs, **_roomless(kwargs, form.given)})
        except NotImplementedError:  # the shape of the result depends on values
            unsized = True
    _make_room(device, form.name, [kwargs.get(name) for name in form.given], shapes)
    values = (_map(_value, args), _map(_value, {**kwargs, **_on(kwargs, _CPU)}))
    if unsized:
        return _read(device, form, func, values)
    if written:
        _queue(
            device, form.name, lambda: func(*values[0], **values[1]), _blocks(tensors), written
        )
        returned = [None] if shapes is None else written
        return returned[0] if len(returned) == 1 else tuple(returned)
    fresh = _map(lambda shape: _empty_like(device, shape), shapes)
    targets = [_backing(target) for target in tensors_in(fresh)]

    def run() -> None:
        if form.fresh:
            poison(targets[0])
            return
        results = tensors_in(_compute(func, *values))
        for target, result in zip(targets, results, strict=True):
            target.copy_(result)

    _queue(device, form.name, run, _blocks(tensors), fresh)
    return fresh


def _roomless(kwargs: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Results that the caller gives, without elements: no shape of theirs is in the way."""
    given = {name: kwargs[name] for name in names if isinstance(kwargs.get(name), Tensor)}
    return {n: torch.empty(0, dtype=t.dtype, device=_META) for n, t in given.items()}


def _make_room(device: Device, name: str, given: Sequence[Any], shapes: Any) -> None:
    """Give memory to results that the caller left empty, as ``torch.eye`` does.

    Raises:
        UnsupportedError: One has elements, and another shape.
    """
    if not given or shapes is None:
        return
    for target, shape in zip(tensors_in(given), tensors_in(shapes), strict=True):
        if target.shape == shape.shape:
            continue
        if target.numel():
            raise UnsupportedError(
                f"{name} got {list(target.shape)} for its result, which has the shape "
                f"{list(shape.shape)}: to change it is not simulated. Give one that is empty, "
                "or has the shape"
            )
        target.data = _empty_like(device, shape)


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Run on the host, in float64 where it lacks the form for a dtype that devices have."""
    try:
        return func(*args, **kwargs)
    except NotImplementedError:
        return func(*_map(Tensor.double, args), **_map(Tensor.double, kwargs))


_known_shapes: dict[Any, Any] = {}


def _shapes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Results on the meta device, remembered: a model asks the same for every layer."""
    key = (func, _signature(args), _signature(kwargs))
    if key not in _known_shapes:
        if len(_known_shapes) >= _MOST_SHAPES:
            _known_shapes.clear()
        metas = (_map(_meta, args), _map(_meta, {**kwargs, **_on(kwargs, _META)}))
        if func is torch.ops.aten._grouped_mm.default:  # torch knows its shape in one dtype
            a, b, *rest = metas[0]
            shape = func(a.bfloat16(), b.bfloat16(), *rest, **metas[1])
            _known_shapes[key] = shape.to(kwargs.get("out_dtype") or args[0].dtype)
        else:
            _known_shapes[key] = func(*metas[0], **metas[1])
    return _known_shapes[key]


def _signature(tree: Any) -> Any:
    """All that the shape of a result can depend on; 1, 1.0 and True are three things."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.stride(), tree.dtype
    if isinstance(tree, list | tuple):
        return tuple(_signature(each) for each in tree)
    if isinstance(tree, dict):
        return tuple((name, _signature(each)) for name, each in tree.items())
    return type(tree), tree


def kernel(
    name: str, run: Callable[..., object], reads: Sequence[Tensor | None], out: Tensor
) -> Tensor:
    """Queue a function as one piece of work, as a vendor's kernel is.

    Args:
        name: For messages.
        run: Gets the tensors of ``reads`` and then ``out`` as they are when it runs.
        reads: Tensors of the device.
        out: Written.
    """
    tensors = [tensor for tensor in reads if tensor is not None]
    device = _device([*tensors, out], {})
    reals = [None if tensor is None else _backing(tensor) for tensor in (*reads, out)]
    _queue(device, name, lambda: run(*reals), _blocks(tensors), [out])
    return out


def install() -> None:
    """Register the device's tensors with torch; again is harmless.

    Raises:
        BackendUnavailableError: Another extension has torch's device for outsiders (HW011).
    """
    if _library:
        return
    from torch.utils.backend_registration import _DummyBackendModule, _DummyDeviceGuard

    owner = torch._C._get_privateuse1_backend_name()
    if owner != DEVICE_TYPE or hasattr(torch, DEVICE_TYPE):
        raise BackendUnavailableError(
            f"torch has room for one device from outside, and {owner!r} has taken it in this "
            "process. Run without that extension; TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch "
            "from loading it",
            code="HW011",
        )
    torch._register_device_module(DEVICE_TYPE, _DummyBackendModule())  # type: ignore[no-untyped-call]
    torch._C._acc.register_python_privateuseone_device_guard(_DummyDeviceGuard())
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name in _FACTORIES:
        packet, _, overload = name.partition(".")
        func = getattr(getattr(torch.ops.aten, packet), overload or "default")
        library.impl(name, _factory(func), "PrivateUse1")
    _library.append(library)


def _factory(func: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: dispatch(func, args, kwargs)


def _queue(
    device: Device,
    name: str,
    run: Callable[[], object],
    reads: Iterable[Block | None],
    writes: Any,
) -> None:
    written = _blocks(tensors_in(writes))
    device.launch(
        name, run, [block for block in reads if block and block not in written], written
    )


def _blocks(tensors: Iterable[Tensor]) -> list[Block]:
    return [tensor.block for tensor in tensors if isinstance(tensor, SimTensor)]


def _copy(device: Device, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``copy_`` in every direction."""
    source.expand(target.shape)  # a shape that does not fit is refused now, not when it runs
    if isinstance(target, SimTensor):
        _copy_to_device(device, target, source, non_blocking)
    else:
        _copy_to_host(device, target, source, non_blocking)
    return target


def _copy_to_device(
    device: Device, target: SimTensor, source: Tensor, non_blocking: bool
) -> None:
    """From pageable memory the values are taken now, from pinned memory when the copy runs."""
    block = source.block if isinstance(source, SimTensor) else device.pinned(source)
    if isinstance(source, SimTensor) or (block is not None and non_blocking):
        values, reads = _backing(source), [block]
    else:
        device.forbid_in_capture("aten.copy_", "copies values from the host as they are now")
        if block is not None:
            device.touch_from_host(block, "aten.copy_", write=False)
        values, reads = plain(source).clone(), []
    backing = target.backing
    _queue(device, "aten.copy_", lambda: backing.copy_(values), reads, target)


def _copy_to_host(device: Device, target: Tensor, source: Tensor, non_blocking: bool) -> None:
    block, backing, host = device.pinned(target), _backing(source), plain(target)
    if block is None or not non_blocking:
        device.read("aten.copy_ to the host")
        host.copy_(backing)
        return
    device.touch_from_host(block, "aten.copy_", write=True)
    poison(host)  # until the copy has run
    device.launch("aten.copy_", lambda: host.copy_(backing), _blocks([source]), [block])


def _to_host(device: Device, name: str, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
    device.read(f"{name} to the host")
    rest = {
        key: kwargs[key] for key in ("dtype", "memory_format") if kwargs.get(key) is not None
    }
    return torch.ops.aten._to_copy.default(_backing(source), **rest)  # type: ignore[no-any-return]


def _read(device: Device, form: _Form, func: Any, values: tuple[Any, Any]) -> Any:
    """An operation whose result the host must see before it can go on."""
    device.read(form.name)
    return _map(lambda value: _filled(device, value), func(*values[0], **values[1]))


def _filled(device: Device, value: Tensor) -> SimTensor:
    target = _empty_like(device, value)
    backing = target.backing
    _queue(device, "result", lambda: backing.copy_(value), (), target)
    return target


def _empty_like(device: Device, shape: Tensor) -> SimTensor:
    strides = shape.stride()
    length = 1 + sum((n - 1) * s for n, s in zip(shape.shape, strides, strict=True))
    memory = device.allocate(length * shape.itemsize if shape.numel() else 0)
    raw = memory.block.bytes.untyped_storage()
    real = torch.empty(0, dtype=shape.dtype).set_(raw, 0, shape.shape, strides)
    return SimTensor(real, memory, device.torch_device)


def _map(change: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, list | tuple):
        return type(tree)(_map(change, each) for each in tree)
    if isinstance(tree, dict):
        return {name: _map(change, each) for name, each in tree.items()}
    return tree


def _backing(tensor: Tensor) -> Tensor:
    return tensor.backing if isinstance(tensor, SimTensor) else plain(tensor)


def _value(tensor: Tensor) -> Tensor:
    """What the work sees of an argument; a number of the host is taken along as it is now."""
    return tensor.backing if isinstance(tensor, SimTensor) else plain(tensor).clone()


def _meta(tensor: Tensor) -> Tensor:
    shape, strides = tensor.shape, tensor.stride()
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=_META)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if place < len(args) else kwargs.get(name)


def _target(kwargs: dict[str, Any]) -> torch.device:
    return torch.device(kwargs.get("device") or DEVICE_TYPE)


def _on(kwargs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments of a factory that say where."""
    found = {"device": device} if kwargs.get("device") is not None else {}
    return found | ({"pin_memory": False} if kwargs.get("pin_memory") else {})


def _device(tensors: Sequence[Tensor], kwargs: dict[str, Any]) -> Device:
    """The device of an operation.

    Raises:
        UnsupportedError: It is about several.
    """
    named = [_target(kwargs)] if kwargs.get("device") is not None else []
    found = [tensor.device for tensor in tensors if isinstance(tensor, SimTensor)] + named
    indices = {device.index or 0 for device in found if device.type == DEVICE_TYPE}
    if len(indices) > 1:
        raise UnsupportedError(
            f"an operation is about the simulated devices {sorted(indices)}. Copy by way of "
            "the host"
        )
    return _taken(indices.pop() if indices else 0)


def _taken(index: int) -> Device:
    if index not in devices:
        raise BackendUnavailableError(
            f"no engine has taken the simulated device {index}; activate the backend first"
        )
    return devices[index]


def _refuse_mixture(device: Device, form: _Form, tensors: Sequence[Tensor]) -> None:
    """Of the host an operation takes single numbers, and positions to index at."""
    for tensor in tensors:
        if isinstance(tensor, SimTensor) or not tensor.dim():
            continue
        if not form.name.startswith("aten.index"):
            raise UnsupportedError(
                f"{form.name} got a tensor {list(tensor.shape)} of the host among those of the "
                "device. Copy it to the device first"
            )
        device.forbid_in_capture(form.name, "takes positions from the host")
