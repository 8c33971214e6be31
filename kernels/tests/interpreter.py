# SPDX-License-Identifier: Apache-2.0
"""Make Triton's interpreter compute bfloat16 as a device does.

As it stands it multiplies bit patterns in ``tl.dot``, gives NaN for arithmetic and truncates
where it should round (triton-lang/triton#11584, #11585); with numpy from 2.4 on triton 3.6
cannot run loops whose bound is a tensor (#9171); before 3.8 it does not know the floats of
eight bits without a negative zero ("fnuz"); and it rounds what becomes a float of eight bits
by its mantissa alone, so 1.97 becomes 1.  From 3.9 on it refuses masks that it has made
numbers itself, of ``mask & (0 < count)``.  ``install`` mends that for tests;
``test_interpreter.py`` checks that it does, so that an upgrade cannot break it in silence.
"""

from __future__ import annotations

__all__ = ["install"]

import numpy as np
import torch

_EIGHT_BITS = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "fp8e5b16": torch.float8_e5m2fnuz,
}
"""Triton's names."""


def _down(x):
    """float32 to the bits of bfloat16, to nearest and even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16))


def install() -> None:
    """Patch the interpreter of the imported triton; call once, before kernels run."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    patch_tensor, patch_core = interpreter._patch_lang_tensor, interpreter._patch_lang_core
    dot, binary, cast = builder.create_dot, builder.binary_op, builder.cast_impl
    narrowing, store = builder.create_fp_to_fp, builder.create_masked_store

    def is_narrow(operand):
        return operand.dtype.scalar == tl.bfloat16

    def up(operand):
        if not is_narrow(operand):
            return operand.data
        return (operand.data.astype(np.uint32) << 16).view(np.float32)

    def patched_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        index = lambda self: int(np.asarray(self.handle.data).item())  # noqa: E731
        scope.set_attr(tensor, "__index__", index)

    def patched_core(lang, scope):
        patch_core(lang, scope)
        to_ir = lang.dtype.to_ir
        fnuz = (tl.float8e4b8, tl.float8e5b16)
        known = lambda self, builder: self if self in fnuz else to_ir(self, builder)  # noqa: E731
        scope.set_attr(lang.dtype, "to_ir", known)

    def patched_dot(self, a, b, d, *rest):
        if not (is_narrow(a) or is_narrow(b)):
            return dot(self, a, b, d, *rest)
        product = np.matmul(up(a), up(b), dtype=np.float32).astype(d.data.dtype)
        return handle(product + d.data, d.dtype.scalar)

    def patched_binary(self, left, right, op):
        if not is_narrow(left):
            return binary(self, left, right, op)
        out = op(up(left), up(right))
        narrow = out.dtype != np.bool_
        return handle(_down(out), tl.bfloat16) if narrow else handle(out, tl.int1)

    def patched_cast(self, source, target):
        narrow = target.scalar == tl.bfloat16
        if narrow and not is_narrow(source):
            return handle(_down(source.data.astype(np.float32)), target.scalar)
        if is_narrow(source) and not narrow:
            dtype = interpreter._get_np_dtype(target)
            return handle(up(source).astype(dtype), target.scalar)
        return cast(self, source, target)

    def patched_narrowing(self, source, target, rounding):
        """To a float of eight bits as torch does it; the rest as it was."""
        eight = _EIGHT_BITS.get(target.scalar.name)
        if eight is None or source.dtype.scalar.name in _EIGHT_BITS:
            return narrowing(self, source, target, rounding)
        wide = torch.from_numpy(np.array(up(source), np.float32))
        return handle(wide.to(eight).view(torch.uint8).numpy(), target.scalar)

    def patched_store(self, where, value, mask, *rest):
        return store(self, where, value, handle(mask.data.astype(np.bool_), tl.int1), *rest)

    interpreter._patch_lang_tensor = patched_tensor
    interpreter._patch_lang_core = patched_core
    builder.create_dot, builder.binary_op = patched_dot, patched_binary
    builder.cast_impl, builder.create_fp_to_fp = patched_cast, patched_narrowing
    builder.create_masked_store = patched_store
