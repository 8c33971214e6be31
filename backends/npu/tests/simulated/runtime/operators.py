# SPDX-License-Identifier: Apache-2.0
"""Bodies of the ``aclnn`` entry points that the tests reach, on the simulated device's memory.

``install`` gives them to ``cann.c``.  An operator without a body fails with its name.
"""

from __future__ import annotations

__all__ = ["install", "seen"]

import ctypes
import os
import sys
import traceback
from collections import Counter

import torch
from backends.npu.tests.simulated import bodies

DTYPES = {
    0: torch.float32, 1: torch.float16, 2: torch.int8, 3: torch.int32, 4: torch.uint8,
    6: torch.int16, 9: torch.int64, 11: torch.float64, 12: torch.bool, 27: torch.bfloat16,
}  # fmt: skip
TENSOR, SCALAR, INTS, TENSORS, BOOLS, FLOATS = range(1, 7)
seen: Counter[str] = Counter()
"""How often each operator ran."""


class Obj(ctypes.Structure):
    pass


Obj._fields_ = [
    ("kind", ctypes.c_int64), ("dtype", ctypes.c_int64), ("count", ctypes.c_int64),
    ("dims", ctypes.c_int64 * 8), ("strides", ctypes.c_int64 * 8), ("offset", ctypes.c_int64),
    ("data", ctypes.c_void_p), ("items", ctypes.POINTER(ctypes.POINTER(Obj))),
    ("next_free", ctypes.c_void_p),
]  # fmt: skip


class Arg(ctypes.Structure):
    _fields_ = [
        ("is_obj", ctypes.c_int64), ("value", ctypes.c_int64), ("text", ctypes.c_char * 32),
        ("obj", ctypes.POINTER(Obj)),
    ]  # fmt: skip


class Op(ctypes.Structure):
    _fields_ = [
        ("index", ctypes.c_int64), ("count", ctypes.c_int64), ("doubles", ctypes.c_double * 8),
        ("floats", ctypes.c_float * 8), ("args", Arg * 72),
    ]  # fmt: skip


class Arguments:
    """Integer and pointer arguments in their order; floating ones apart."""

    def __init__(self, op):
        self.op = op
        self.values = [decode(op.args[i]) for i in range(op.count)]

    def __getitem__(self, index):
        return self.values[index]

    def text(self, index):
        return bytes(self.op.args[index].text).decode(errors="replace")

    def double(self, index=0):
        return self.op.doubles[index]

    def tensors(self):
        return [x for x in self.values if isinstance(x, torch.Tensor)]


def decode(arg):
    return value_of(arg.obj.contents) if arg.is_obj else arg.value


def value_of(obj):
    if obj.kind == TENSOR:
        return tensor_of(obj)
    if obj.kind == SCALAR:
        raw = (ctypes.c_char * 8).from_address(obj.data)
        return torch.frombuffer(bytearray(raw), dtype=DTYPES[obj.dtype])[0].item()
    if obj.kind == INTS:
        return list((ctypes.c_int64 * obj.count).from_address(obj.data)) if obj.count else []
    if obj.kind == BOOLS:
        return list((ctypes.c_bool * obj.count).from_address(obj.data)) if obj.count else []
    if obj.kind == TENSORS:
        return [value_of(obj.items[i].contents) for i in range(obj.count)]
    raise TypeError(f"object of kind {obj.kind}")


def tensor_of(obj):
    dtype, count = DTYPES[obj.dtype], obj.count
    dims, strides = list(obj.dims[:count]), list(obj.strides[:count])
    if not obj.data or 0 in dims:
        return torch.empty(dims, dtype=dtype)
    reach = 1 + sum((d - 1) * s for d, s in zip(dims, strides, strict=False))
    size = (obj.offset + reach) * dtype.itemsize
    memory = torch.frombuffer((ctypes.c_char * size).from_address(obj.data), dtype=dtype)
    return memory.as_strided(dims, strides, obj.offset)


def attention(first, sink=None):
    """Any release of fused-infer attention: ``first`` is the place of the number of heads."""

    def body(a):
        t = a.values
        out = bodies.attend(bodies.AttentionCall(
            query=t[0], key=t[1][0], value=t[2][0], mask=given(t[4]), q_lens=given(t[5]),
            kv_lens=given(t[6]), table=given(t[14]), query_rope=given(t[24]),
            key_rope=given(t[25]), sink=None if sink is None else given(t[sink]),
            heads=t[first], scale=a.double(), before=t[first + 1], after=t[first + 2],
            layout=a.text(first + 3), kv_heads=t[first + 4] or t[first],
            sparse=small(t[first + 5]), block=small(t[first + 7]),
        ))  # fmt: skip
        a.tensors()[-2].copy_(out)

    return body


def given(x):
    return None if isinstance(x, int) else x


def small(x):
    return x & 0xFFFFFFFF


def into(function):
    """An operator whose last tensor is its result."""

    def body(a):
        *operands, out = a.tensors()
        out.copy_(function(a, *operands))

    return body


def in_place(function):
    def body(a):
        target, *operands = a.tensors()
        target.copy_(function(a, target, *operands))

    return body


def scalar(a):
    """The one scalar object among the arguments."""
    found = [i for i in range(a.op.count) if a.op.args[i].is_obj]
    return next(a.values[i] for i in found if a.op.args[i].obj.contents.kind == SCALAR)


def scalars(a):
    found = [i for i in range(a.op.count) if a.op.args[i].is_obj]
    return [a.values[i] for i in found if a.op.args[i].obj.contents.kind == SCALAR]


def first_scalar(a):
    return scalars(a)[0]


def index_of(parts, target):
    """Indices as torch takes them; an empty tensor stands for a whole dimension."""
    return tuple(slice(None) if x.numel() == 0 and target.dim() else x.long() for x in parts)


def index(a):
    source, parts, out = a[0], a[1], a.tensors()[-1]
    out.copy_(source[index_of(parts, source)])


def index_put(a):
    target, parts, values = a[0], a[1], a[2]
    target.index_put_(index_of(parts, target), values, accumulate=bool(a[3] & 1))


def cat(a):
    parts = [x for x in a[0] if x.numel()]
    a.tensors()[-1].copy_(torch.cat(parts, a[1]))


def arange(a):
    start, end, step = scalars(a)
    out = a.tensors()[-1]
    out.copy_(torch.arange(start, end, step)[: out.numel()])


def scatter(a):
    """aclnnScatterPaKvCache: key, key cache, slots, value, value cache."""
    key, key_cache, slots, value, value_cache = a.tensors()[:5]
    mode = next(
        (t for i in range(a.op.count) if (t := a.text(i)) in ("Norm", "PA_NZ")), "PA_NZ"
    )
    bodies.scatter(key, value, key_cache, value_cache, slots, cache_mode=mode)


def norm(body):
    """Operands, epsilon, results."""

    def call(a):
        tensors = a.tensors()
        wanted = 3 if body is bodies.add_rms_norm else 2
        results = body(*tensors[:wanted], a.double())
        for out, result in zip(tensors[wanted:], results, strict=False):
            if out.numel() == result.numel():
                out.copy_(result.reshape(out.shape))

    return call


def rotary(a):
    x, cos, sin, *_rest, out = a.tensors()
    modes = {0: "half", 1: "interleave"}
    out.copy_(bodies.rotary_mul(x, cos, sin, modes[a[3] & 0xFF]))


def reduce(function):
    """self, dims, keepdim, …, out."""

    def body(a):
        out = a.tensors()[-1]
        dims = next((x for x in a.values[1:] if isinstance(x, list)), None)
        keep = bool(a[2] & 0xFF) if isinstance(a[2], int) else False
        out.copy_(function(a[0], dims, keep))

    return body


def with_indices(function):
    """self, dim, keepdim, values, indices."""

    def body(a):
        values, indices = a.tensors()[-2:]
        got = function(a[0], a[1], bool(a[2] & 0xFF))
        values.copy_(got.values)
        indices.copy_(got.indices)

    return body


def argmax(a):
    a.tensors()[-1].copy_(a[0].argmax(a[1], bool(a[2] & 0xFF)))


def sort(a):
    values, indices = a.tensors()[-2:]
    got = torch.sort(a[0], dim=a[2], descending=bool(a[3] & 0xFF), stable=True)
    values.copy_(got.values)
    indices.copy_(got.indices)


def topk(a):
    values, indices = a.tensors()[-2:]
    got = torch.topk(a[0], a[1], a[2], bool(a[3] & 0xFF), bool(a[4] & 0xFF))
    values.copy_(got.values)
    indices.copy_(got.indices)


def clamp(a):
    low, high = (x if a.op.args[i].is_obj else None for i, x in ((1, a[1]), (2, a[2])))
    a.tensors()[-1].copy_(a[0].clamp(low, high))


def index_copy(a):
    a[0].index_copy_(a[1], a[2].long(), a[3])


def nan_to_num(a):
    """self, three floats, out."""
    a.tensors()[-1].copy_(torch.nan_to_num(a[0], *(float(x) for x in a.op.floats[:3])))


def pad(a):
    a.tensors()[-1].copy_(torch.nn.functional.pad(a[0], a[1], value=first_scalar(a)))


def foreach_copy(a):
    lists = [x for x in a.values if isinstance(x, list)]
    for source, target in zip(*lists[:2], strict=False):
        target.copy_(source)


def linear(a, bias, x, y):
    beta, alpha = scalars(a)
    return beta * bias + alpha * (x @ y)


def rounded(mode):
    return {0: None, 1: "trunc", 2: "floor"}[mode & 0xFF]


def scaled(a):
    """Alpha of a sum; its other scalar, if it has one, comes first."""
    return scalars(a)[-1]


def fill(value):
    def body(a):
        a.tensors()[0].fill_(value(a))

    return body


ELEMENTS = {
    "Silu": torch.nn.functional.silu, "Neg": torch.neg, "Rsqrt": torch.rsqrt, "Cos": torch.cos,
    "Sin": torch.sin, "Exp": torch.exp, "Log": torch.log, "Sqrt": torch.sqrt, "Abs": torch.abs,
    "Sigmoid": torch.sigmoid, "LogicalNot": torch.logical_not, "BitwiseNot": torch.bitwise_not,
    "Reciprocal": torch.reciprocal, "IsFinite": torch.isfinite, "Isfinite": torch.isfinite,
    "IsNan": torch.isnan, "Tanh": torch.tanh,
}  # fmt: skip
PAIRS = {
    "Mul": torch.mul, "Div": torch.div, "Maximum": torch.maximum, "Minimum": torch.minimum,
    "EqTensor": torch.eq, "NeTensor": torch.ne, "LtTensor": torch.lt, "LeTensor": torch.le,
    "GtTensor": torch.gt, "GeTensor": torch.ge, "LogicalAnd": torch.logical_and,
    "LogicalOr": torch.logical_or, "BitwiseAndTensor": torch.bitwise_and,
    "BitwiseOrTensor": torch.bitwise_or, "BitwiseXorTensor": torch.bitwise_xor,
    "FloorDivide": torch.floor_divide, "RemainderTensorTensor": torch.remainder,
    "PowTensorTensor": torch.pow,
}  # fmt: skip
WITH_SCALAR = {
    "Muls": torch.mul, "Divs": torch.div, "EqScalar": torch.eq, "NeScalar": torch.ne,
    "LtScalar": torch.lt, "LeScalar": torch.le, "GtScalar": torch.gt, "GeScalar": torch.ge,
    "FloorDivides": torch.floor_divide, "RemainderTensorScalar": torch.remainder,
    "PowTensorScalar": torch.pow, "BitwiseAndScalar": torch.bitwise_and,
    "BitwiseOrScalar": torch.bitwise_or, "BitwiseXorScalar": torch.bitwise_xor,
    "ClampMin": torch.clamp_min, "ClampMax": torch.clamp_max,
}  # fmt: skip
BODIES = {
    "aclnnFusedInferAttentionScoreV3": attention(27),
    "aclnnFusedInferAttentionScoreV4": attention(29, sink=28),
    "aclnnFusedInferAttentionScoreV5": attention(31, sink=28),  # what a 950 is given
    "aclnnScatterPaKvCache": scatter,
    "aclnnRmsNorm": norm(bodies.rms_norm),
    "aclnnGemmaRmsNorm": norm(bodies.gemma_rms_norm),
    "aclnnAddRmsNorm": norm(bodies.add_rms_norm),
    "aclnnRotaryPositionEmbedding": rotary,
    "aclnnRotaryPositionEmbeddingV2": rotary,
    "aclnnTopkV2": topk,
    "aclnnSwiGlu": into(lambda a, x: bodies.swiglu(x, a[1])),
    "aclnnInplaceCopy": in_place(lambda a, target, source: source),
    "aclnnCast": into(lambda a, x: x),
    "aclnnAdd": into(lambda a, x, y: x + scaled(a) * y if scaled(a) != 1 else x + y),
    "aclnnSub": into(lambda a, x, y: x - scaled(a) * y if scaled(a) != 1 else x - y),
    "aclnnAdds": into(lambda a, x: x + scalars(a)[0] * scaled(a)),
    "aclnnSubs": into(lambda a, x: x - scalars(a)[0] * scaled(a)),
    "aclnnInplaceAdd": in_place(lambda a, x, y: x + scaled(a) * y),
    "aclnnInplaceSub": in_place(lambda a, x, y: x - scaled(a) * y),
    "aclnnInplaceAdds": in_place(lambda a, x: x + scalars(a)[0] * scaled(a)),
    "aclnnInplaceSubs": in_place(lambda a, x: x - scalars(a)[0] * scaled(a)),
    "aclnnDivMods": into(
        lambda a, x: torch.div(x, first_scalar(a), rounding_mode=rounded(a[2]))
    ),
    "aclnnDivMod": into(lambda a, x, y: torch.div(x, y, rounding_mode=rounded(a[2]))),
    "aclnnMatmul": into(lambda a, x, y: x @ y),
    "aclnnMm": into(lambda a, x, y: x @ y),
    "aclnnBatchMatMul": into(lambda a, x, y: x @ y),
    "aclnnAddmm": into(linear),
    "aclnnIndexSelect": into(lambda a, x, at: x.index_select(a[1], at.long())),
    "aclnnEmbedding": into(lambda a, table, at: table[at.long()]),
    "aclnnGather": into(lambda a, x, at: x.gather(a[1], at.long())),
    "aclnnIndex": index,
    "aclnnIndexPutImpl": index_put,
    "aclnnInplaceIndexCopy": index_copy,
    "aclnnClamp": clamp,
    "aclnnRepeatInterleaveIntWithDim": into(lambda a, x: x.repeat_interleave(a[1], a[2])),
    "aclnnEqual": into(lambda a, x, y: torch.tensor([torch.equal(x, y)])),
    "aclnnNanToNum": nan_to_num,
    "aclnnStack": into(lambda a: torch.stack(a[0], a[1])),
    "aclnnCat": cat,
    "aclnnArange": arange,
    "aclnnTriu": into(lambda a, x: x.triu(a[1])),
    "aclnnSWhere": into(lambda a, fine, x, y: torch.where(fine, x, y)),
    "aclnnInplaceZero": fill(lambda a: 0),
    "aclnnInplaceOne": fill(lambda a: 1),
    "aclnnInplaceFillScalar": fill(first_scalar),
    "aclnnInplaceFillTensor": in_place(lambda a, target, value: value),
    "aclnnInplaceMaskedFillScalar": in_place(
        lambda a, x, at: x.masked_fill(at, first_scalar(a))
    ),
    "aclnnInplaceMaskedFillTensor": in_place(lambda a, x, at, value: x.masked_fill(at, value)),
    "aclnnMean": reduce(lambda x, dims, keep: x.mean(dims, keep)),
    "aclnnMeanV2": reduce(lambda x, dims, keep: x.mean(dims, keep)),
    "aclnnReduceSum": reduce(lambda x, dims, keep: x.sum(dims, keep)),
    "aclnnAmax": reduce(lambda x, dims, keep: x.amax(dims, keep)),
    "aclnnAny": reduce(lambda x, dims, keep: x.any() if not dims else x.any(dims[0], keep)),
    "aclnnAll": reduce(lambda x, dims, keep: x.all() if not dims else x.all(dims[0], keep)),
    "aclnnMax": into(lambda a, x: x.max()),
    "aclnnMin": into(lambda a, x: x.min()),
    "aclnnMaxDim": with_indices(torch.max),
    "aclnnMinDim": with_indices(torch.min),
    "aclnnArgMax": argmax,
    "aclnnSort": sort,
    "aclnnTopk": topk,
    "aclnnSoftmax": into(lambda a, x: x.softmax(a[1])),
    "aclnnLogSoftmax": into(lambda a, x: x.log_softmax(a[1])),
    "aclnnCumsum": into(lambda a, x: x.cumsum(a[1])),
    "aclnnConstantPadNd": pad,
    "aclnnForeachCopy": foreach_copy,
    **{f"aclnn{n}": into(lambda a, x, f=f: f(x)) for n, f in ELEMENTS.items()},
    **{f"aclnn{n}": into(lambda a, x, y, f=f: f(x, y)) for n, f in PAIRS.items()},
    **{f"aclnn{n}": into(lambda a, x, f=f: f(x, scalar(a))) for n, f in WITH_SCALAR.items()},
    **{f"aclnnInplace{n}": in_place(lambda a, x, f=f: f(x)) for n, f in ELEMENTS.items()},
    **{f"aclnnInplace{n}": in_place(lambda a, x, y, f=f: f(x, y)) for n, f in PAIRS.items()},
    **{
        f"aclnnInplace{n}": in_place(lambda a, x, f=f: f(x, scalar(a)))
        for n, f in WITH_SCALAR.items()
    },
}


def run(pointer):
    op = pointer.contents
    name = NAMES[op.index].removesuffix("GetWorkspaceSize")
    body = BODIES.get(name)
    seen[name] += 1
    if body is None:
        report(f"no body for {name}; its arguments: {describe(op)}")
        return 1
    try:
        with torch.no_grad():
            body(Arguments(op))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        report(f"{name}: {type(error).__name__}: {error} ({where.name}:{where.lineno})")
        if os.environ.get("SIM_TRACE"):
            print(describe(op), file=sys.stderr)
        return 1
    return 0


def describe(op):
    def show(value):
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return str([show(x) for x in value]) if isinstance(value, list) else repr(value)

    return ", ".join(f"{i}={show(decode(op.args[i]))}" for i in range(op.count))


def report(text):
    LIBRARY.sim_report(text.encode()[:1900])
    if os.environ.get("SIM_TRACE"):
        print(text, file=sys.stderr)


def install(library, names):
    """Give the bodies to the library of ``cann.c``."""
    global LIBRARY, NAMES, CALLBACK
    LIBRARY, NAMES = ctypes.CDLL(library), names
    CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Op))(run)
    LIBRARY.sim_set_body(CALLBACK)
