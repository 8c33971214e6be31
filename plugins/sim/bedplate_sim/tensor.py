# SPDX-License-Identifier: Apache-2.0
"""Tensors of the simulated device: every operation of torch on them is work that is queued.

``install`` makes torch's device for outsiders, ``privateuseone``, ours in this process.  A
``SimTensor`` has shape and strides; behind it is memory that only queued work touches.  Views
are made at once, since they touch no memory; shapes of results come from torch's meta device.
"""

from __future__ import annotations

__all__ = ["DEVICE_TYPE", "PinnedTensor", "SimTensor", "devices", "install", "kernel"]

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from bedplate.errors import BackendUnavailableError, UnsupportedError
from bedplate_sim.allocator import poison

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from bedplate_sim.allocator import Allocation, Block
    from bedplate_sim.device import Device

DEVICE_TYPE = "privateuseone"
"""Torch's name of the device type; it stays unnamed, so that ``torch.accelerator`` and whoever
gives it a name are left alone."""

devices: dict[int, Device] = {}
"""Index → the device that an engine has taken."""

_CPU = torch.device("cpu")
_META = torch.device("meta")
_FACTORIES = ("empty.memory_format", "empty_strided", "arange", "arange.start",
              "arange.start_step", "copy_")  # fmt: skip
_MOST_SHAPES = 1 << 14
_library: list[torch.library.Library] = []


class SimTensor(Tensor):
    """A tensor in device memory.

    Attributes:
        backing: The same tensor over the host memory that stands for the device's.
        memory: Held as long as any tensor lies in it.
    """

    backing: Tensor
    memory: Allocation

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, real: Tensor, memory: Allocation, device: torch.device) -> Self:
        """Wrap a tensor over device memory."""
        self: Self = Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(),
            dtype=real.dtype, device=device,
        )  # fmt: skip
        self._adopt(real, memory)
        return self

    def _adopt(self, real: Tensor, memory: Allocation) -> None:
        self.backing, self.memory = real, memory

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Queue one operation."""
        return dispatch(func, args, kwargs or {})

    @property
    def block(self) -> Block:
        """The memory it lies in."""
        return self.memory.block

    @property
    def data(self) -> Tensor:
        """As of every tensor; assigning lets it lie elsewhere."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, SimTensor)
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self._adopt(value.backing, value.memory)

    def data_ptr(self) -> int:
        """Its address."""
        return self.backing.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """For its address and size; what it holds is the device's."""
        return self.backing.untyped_storage()

    def tolist(self) -> Any:
        """Wait for the device and read."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """As torch: a copy on the host has to be made first."""
        if force:
            return self.cpu().numpy()
        raise TypeError(f"can't convert a tensor of {self.device} to numpy; use .cpu() first")

    def __array__(self, *_args: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = self.detach().clone()
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"SimTensor({list(self.shape)}, {self.dtype}, {self.device}, {self.data_ptr():#x})"
        )


class PinnedTensor(Tensor):
    """Host memory that queued copies read and write; reading it is checked."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Views stay pinned; whoever looks inside must have waited."""
        kwargs, name = kwargs or {}, func.__name__
        with torch._C.DisableTorchFunctionSubclass():
            tensors = list(_tensors((args, kwargs)))
            if name not in _KEEPS_OUT and not any(isinstance(t, SimTensor) for t in tensors):
                for tensor in tensors:
                    _check_look(tensor, name)
            result = func(*args, **kwargs)
            if type(result) is Tensor and _pinned(result) is not None:
                return result.as_subclass(cls)
        return result


_KEEPS_OUT = frozenset(
    ("__get__", "__getitem__", "__len__", "as_subclass", "data_ptr", "detach", "dim", "narrow",
     "numel", "size", "stride", "storage_offset", "to", "untyped_storage", "view")
)  # fmt: skip
"""Functions that see no values of their tensor."""


class _Form(NamedTuple):
    """What torch's schema says of an operation."""

    name: str
    view: bool
    fresh: bool
    unsized: bool
    reshapes: bool
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
        writes=writes,
    )


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation of torch on tensors of the device.

    Raises:
        UnsupportedError: It changes a shape in place, or mixes devices.
        CaptureError: It reads values, and a graph is captured.
    """
    form = _form(func)
    tensors = list(_tensors((args, kwargs)))
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
    values = (_map(_value, args), _map(_value, {**kwargs, **_on(kwargs, _CPU)}))
    _refuse_mixture(device, form, tensors)
    if form.unsized:
        return _read(device, form, func, values)
    try:
        shapes = _shapes(func, args, kwargs)
    except NotImplementedError:  # the shape of the result depends on values
        return _read(device, form, func, values)
    written = [_argument(args, kwargs, place, name) for place, name in form.writes]
    if written:
        _queue(
            device, form.name, lambda: func(*values[0], **values[1]), _blocks(tensors), written
        )
        returned = [None] if shapes is None else written
        return returned[0] if len(returned) == 1 else tuple(returned)
    fresh = _map(lambda shape: _empty_like(device, shape), shapes)
    targets = [_backing(target) for target in _tensors(fresh)]

    def run() -> None:
        if form.fresh:
            poison(targets[0])
            return
        results = _tensors(func(*values[0], **values[1]))
        for target, result in zip(targets, results, strict=True):
            target.copy_(result)

    _queue(device, form.name, run, _blocks(tensors), fresh)
    return fresh


_known_shapes: dict[Any, Any] = {}


def _shapes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Results on the meta device, remembered: a model asks the same for every layer."""
    key = (func, _signature(args), _signature(kwargs))
    if key not in _known_shapes:
        if len(_known_shapes) >= _MOST_SHAPES:
            _known_shapes.clear()
        _known_shapes[key] = func(
            *_map(_meta, args), **_map(_meta, {**kwargs, **_on(kwargs, _META)})
        )
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
    written = _blocks(_tensors(writes))
    device.launch(
        name, run, [block for block in reads if block and block not in written], written
    )


def _blocks(tensors: Iterable[Tensor]) -> list[Block]:
    return [tensor.block for tensor in tensors if isinstance(tensor, SimTensor)]


def _copy(device: Device, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``copy_`` in every direction.

    From pageable memory the values are taken at once, from pinned memory when the copy runs.
    """
    name = "aten.copy_"
    if not isinstance(target, SimTensor):
        block = device.pinned(target)
        if block is None or not non_blocking:
            device.read(f"{name} to the host")
            _plain(target).copy_(_backing(source))
        else:
            device.touch_from_host(block, name, write=True)
            real, plain = _backing(source), _plain(target)
            poison(plain)
            device.launch(name, lambda: plain.copy_(real), [source.block], [block])  # type: ignore[attr-defined]
        return target
    source.expand(target.shape)  # a shape that does not fit is refused now, not when it runs
    block = source.block if isinstance(source, SimTensor) else device.pinned(source)
    if isinstance(source, SimTensor) or (block is not None and non_blocking):
        values, reads = _backing(source), [block]
    else:
        if block is not None:
            device.touch_from_host(block, name, write=False)
        values, reads = _plain(source).clone(), []
    real = target.backing
    _queue(device, name, lambda: real.copy_(values), reads, [target])
    return target


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


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for each in tree:
            yield from _tensors(each)
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))


def _backing(tensor: Tensor) -> Tensor:
    return tensor.backing if isinstance(tensor, SimTensor) else _plain(tensor)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor) if isinstance(tensor, PinnedTensor) else tensor


def _value(tensor: Tensor) -> Tensor:
    """What the work sees of an argument; a number of the host is taken along as it is now."""
    return tensor.backing if isinstance(tensor, SimTensor) else _plain(tensor).clone()


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


def _pinned(tensor: Tensor) -> tuple[Device, Block] | None:
    for device in devices.values():
        block = device.pinned(tensor)
        if block is not None:
            return device, block
    return None


def _check_look(tensor: Tensor, name: str) -> None:
    """Refuse the host what queued work still writes, and to write what it still reads."""
    found = _pinned(tensor)
    if found is not None:
        device, block = found
        write = name in ("numpy", "__setitem__") or name.endswith("_")
        device.touch_from_host(block, f"Tensor.{name} of pinned memory", write=write)
