# SPDX-License-Identifier: Apache-2.0
"""A pure-Python ``npu`` device with the graph semantics of torch_npu; layer B.

A tensor on it wraps a host tensor, and every operation reaches ``run``, which executes it on
the host.  Simulated are: where tensors lie (mixing devices fails), what a capture forbids, that
a graph replays recorded addresses and host numbers, that a replay waits for its update, and
who has waited for whom.  There is no concurrency: an update that could overtake the replay
before it is found by comparing what the host knows to be finished, not by luck.  An event says
once that it was not reached yet; memory is what live tensors hold.

``install`` makes it the device of this process under the name ``npu``; torch_npu itself cannot
be in the same process.
"""

from __future__ import annotations

__all__ = ["install", "state"]

import sys
import threading
import types
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from backends.npu.tests.simulated.bodies import BODIES
from backends.npu.tests.simulated.schemas import define
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.weak import WeakIdKeyDictionary

_HOST_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "_unique2", "masked_select")
_MOVES = ("copy_", "_to_copy")
PATIENCE_S = 0.3
"""A replay waits so long for an update, which another thread may be making."""


class State:
    """What the device is and does.

    Attributes:
        devices: How many there are.
        soc: Number of the system on chip; 220 is an A2.
        most_graphs: Graphs that streams suffice for.
        capturing: The graph that is being recorded.
        launched: Replays issued so far.
        finished: Replays that the host knows to have finished.
        tensors: Everything alive on the device.
        pinned: Addresses of page-locked host memory.
    """

    def __init__(self):
        self.devices, self.soc, self.most_graphs = 1, 220, 1000
        self.capturing = None
        self.launched = self.finished = self.graphs = 0
        self.stream = Stream("default")
        self.total_bytes = 4 << 30
        self.tensors = WeakIdKeyDictionary()
        self.pinned = set()

    def waited(self):
        """The host has waited for everything."""
        self.forbid_waiting("a synchronisation")
        self.finished = self.launched

    def allocated_bytes(self):
        """Bytes of the storage that tensors on the device hold."""
        held = (tensor.raw.untyped_storage() for tensor in list(self.tensors))
        return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())

    def forbid_waiting(self, what):
        if self.capturing is not None:
            raise RuntimeError(f"error code is 107027: {what} while a stream is captured")


class NpuTensor(torch.Tensor):
    """A tensor on the device; ``raw`` holds its numbers on the host."""

    @staticmethod
    def __new__(cls, raw):
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, device="npu:0",
        )  # fmt: skip
        made.raw = raw
        state.tensors[made] = True
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"npu {self.raw!r}"

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = NpuTensor(self.raw.clone())
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        return copied

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, new):
        torch.Tensor.data.__set__(self, new)
        self.raw = new.raw

    def untyped_storage(self):
        return self.raw.untyped_storage()

    def data_ptr(self):
        return self.raw.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self):
        raise TypeError("can't convert npu:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """One operation, on the host, recorded if a capture is under way."""
    name = func.overloadpacket.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = {id(x.raw): x for x in tensors if isinstance(x, NpuTensor)}
    strange = [x for x in tensors if not isinstance(x, NpuTensor) and x.dim()]
    if name not in _MOVES and ours and strange:
        raise RuntimeError(f"{func}: all tensors must be on npu:0, found one on the host")
    target = kwargs.get("device")
    to_host = (target is not None and torch.device(target).type != "npu") or (
        name == "copy_" and not isinstance(args[0], NpuTensor)
    )
    asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
    if name in _HOST_READS or (name in _MOVES and (to_host or strange) and not asynchronous):
        state.forbid_waiting(str(func))
        state.finished = state.launched
    raw_args, raw_kwargs = raw((args, kwargs))
    if "device" in raw_kwargs:
        raw_kwargs["device"] = "cpu"
    raw_kwargs.pop("pin_memory", None)
    result = execute(func, raw_args, raw_kwargs)
    if state.capturing is not None and not to_host:
        state.capturing.record(func, raw_args, raw_kwargs, result, ours)
    grown = [x for x in ours.values() if x.raw.size() != x.size() and "resize" not in name]
    assert not grown, f"{func} gave a tensor another size in place"
    if to_host:
        return args[0] if name == "copy_" else result
    return tree_map(lambda x: wrapped(x, ours), result)


def execute(func, args, kwargs):
    body = BODIES.get(func.overloadpacket.__name__) if func.namespace == "npu" else None
    if func is torch.ops.aten.histc.default and not args[0].is_floating_point():
        return func(args[0].float(), *args[1:], **kwargs).to(
            args[0].dtype
        )  # the host's lacks it
    if body is None:
        return func(*args, **kwargs)
    given = dict(kwargs)
    for argument, value in zip(func._schema.arguments, args, strict=False):
        given[argument.name] = value
    names = [a.name for a in func._schema.arguments if not a.kwarg_only]
    for argument in func._schema.arguments:
        given.setdefault(argument.name, argument.default_value)
    positional = [given.pop(name) for name in names]
    return body(*positional, **given)


def raw(tree):
    return tree_map(lambda x: x.raw if isinstance(x, NpuTensor) else x, tree)


def wrapped(x, ours):
    if not isinstance(x, torch.Tensor):
        return x
    return ours[id(x)] if id(x) in ours else NpuTensor(x)


class Record:
    """An attention call whose lengths can be renewed; as torch_npu keeps it."""

    def __init__(self, kwargs):
        self.kwargs = {
            k: v if isinstance(v, torch.Tensor) else deepcopy(v) for k, v in kwargs.items()
        }
        self.ready = threading.Event()


class NPUGraph:
    """Operations at recorded addresses; lengths are those of the last update."""

    def __init__(self):
        self.graph_dispatch_mode = types.SimpleNamespace(graph_dispatch_records=[])
        self.auto_dispatch_capture = False
        self._steps = []
        self._last = 0

    def record(self, func, args, kwargs, result, ours):
        record = None
        if self.auto_dispatch_capture and "fused_infer" in func.overloadpacket.__name__:
            record = Record(kwargs)
            self.graph_dispatch_mode.graph_dispatch_records.append(record)
        kwargs = kwargs if record is None else record.kwargs
        kept = tree_map(lambda x: x, (args, kwargs)) if record is None else (args, kwargs)
        inputs = {x.raw.untyped_storage().data_ptr() for x in ours.values()}
        self._steps.append((func, *kept, tensors_of(result), record, inputs))

    def poison(self):
        """A capture computes nothing: whoever reads its results reads nonsense."""
        for _func, _args, _kwargs, results, _record, inputs in self._steps:
            for result in results:
                fresh = result.untyped_storage().data_ptr() not in inputs
                if fresh and result.is_floating_point():
                    result.fill_(float("nan"))

    def update(self, cpu_update_input):
        if not self.auto_dispatch_capture:
            raise RuntimeError("The current graph configuration does not support update")
        records = self.graph_dispatch_mode.graph_dispatch_records
        if len(cpu_update_input) == 1:
            cpu_update_input = cpu_update_input * len(records)
        if len(cpu_update_input) != len(records):
            raise RuntimeError(
                f"Currently, there are {len(records)} operators that need to be updated by "
                f"capture, and there are only {len(cpu_update_input)} elements"
            )
        if state.finished < self._last:
            raise RuntimeError(
                "race: the update may overtake the replay before it, which then waits for ever"
            )
        for record, new in zip(records, cpu_update_input, strict=False):
            record.kwargs.update({k: v for k, v in new.items() if k in record.kwargs})
            record.ready.set()

    def replay(self):
        for func, args, kwargs, results, record, _inputs in self._steps:
            if record is not None:
                if not record.ready.wait(PATIENCE_S):
                    raise RuntimeError("dead-lock: the graph waits for an update")
                record.ready.clear()
            for old, new in zip(results, tensors_of(execute(func, args, kwargs)), strict=False):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        state.launched += 1
        self._last = state.launched

    def reset(self):
        self._steps.clear()


def tensors_of(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Stream:
    def __init__(self, device=None, priority=0):
        self.name = device if device == "default" else "side"

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass

    def synchronize(self):
        state.waited()


class Event:
    def __init__(self, *args, **kwargs):
        self._seen, self._reached = 0, True

    def record(self, stream=None):
        self._seen, self._reached = state.launched, False

    def query(self):
        state.forbid_waiting("a query")
        if self._reached:
            state.finished = max(state.finished, self._seen)
            return True
        self._reached = True  # at the next question
        return False

    def synchronize(self):
        state.forbid_waiting("a synchronisation")
        state.finished, self._reached = max(state.finished, self._seen), True

    def wait(self, stream=None):
        pass


@contextmanager
def stream(chosen):
    before, state.stream = state.stream, chosen
    try:
        yield
    finally:
        state.stream = before


@contextmanager
def graph(
    npu_graph, pool=None, stream=None, auto_dispatch_capture=False, capture_error_mode="global"
):
    """As ``torch.npu.graph``."""
    chosen = stream or Stream()
    if chosen.name == "default":
        raise RuntimeError("NPU graphs must be captured on a non-default stream.")
    if state.graphs >= state.most_graphs:
        raise RuntimeError("error code is 207008: stream resource is not enough")
    state.waited()
    npu_graph.auto_dispatch_capture = auto_dispatch_capture
    before, state.stream, state.capturing = state.stream, chosen, npu_graph
    try:
        yield
        state.graphs += 1
    finally:
        state.stream, state.capturing = before, None
    npu_graph.poison()


class Module:
    """``torch.npu``."""

    NPUGraph, Stream, Event, ExternalEvent = NPUGraph, Stream, Event, Event
    graph, stream = staticmethod(graph), staticmethod(stream)

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def device_count(self):
        return state.devices

    def current_device(self):
        return 0

    def set_device(self, device):
        if (torch.device(device).index or 0) >= state.devices:
            raise RuntimeError("SetDevice failed: invalid device id, error code is 107001")

    def get_soc_version(self):
        return state.soc

    def get_device_name(self, device=None):
        return "Simulated910B"

    def synchronize(self, device=None):
        state.waited()

    def current_stream(self, device=None):
        return state.stream

    def mem_get_info(self, device=None):
        return state.total_bytes - state.allocated_bytes(), state.total_bytes

    def memory_allocated(self, device=None):
        return state.allocated_bytes()

    def empty_cache(self):
        pass

    def graph_pool_handle(self):
        return object()

    def manual_seed(self, seed):
        pass

    def manual_seed_all(self, seed):
        pass

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self):
        return True

    def has_primary_context(self, _device):
        return True

    def is_built(self):
        return True


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self):
        return torch._C._autograd.DeviceType.PrivateUse1


state = State()
_kept: list[object] = []


def _factory(func):
    return lambda *args, **kwargs: run(func, args, kwargs)


def install():
    """Make this the device ``npu`` of the process, and define the operators of torch_npu."""
    module = Module()
    _setup_privateuseone_for_python_backend("npu", module, _Hooks(), _Guard())
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(lambda func, *args, **kwargs: run(func, args, kwargs), "PrivateUse1")
    # The composite form grows an empty tensor in place, which a wrapper cannot follow.
    factories = torch.library.Library("aten", "IMPL")
    for name in ("arange", "arange.start", "arange.start_step", "eye", "eye.m"):
        packet, _, overload = name.partition(".")
        made = getattr(getattr(torch.ops.aten, packet), overload or "default")
        factories.impl(name, _factory(made), "PrivateUse1")
    _kept.extend((fallback, factories, define(Path(__file__).with_name("schemas.json"))))
    make = torch.empty

    def empty(*args, pin_memory=False, **kwargs):
        made = make(*args, **kwargs)  # host memory is host memory here
        if pin_memory:
            state.pinned.add(made.untyped_storage().data_ptr())
        return made

    def is_pinned(tensor, *_device):
        return tensor.untyped_storage().data_ptr() in state.pinned

    make_from_data = torch.tensor

    def tensor(data, *, device=None, **kwargs):
        made = make_from_data(data, **kwargs)  # of another device it fails inside of torch
        return made if device is None else made.to(device)

    torch.empty, torch.tensor, torch.Tensor.is_pinned = empty, tensor, is_pinned
    sys.modules["torch_npu"].npu = module
