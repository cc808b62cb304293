"""Repair of Triton's interpreter for tests: bfloat16 that computes, and `range` over a tensor.

The interpreter (3.6.0 and 3.8.0 were looked at) keeps bfloat16 as the bits in a uint16 and computes on those: products,
sums and comparisons are silently wrong, and float32 is cut off to bfloat16, not rounded. Its authors call bfloat16
unsupported there. Here such values are widened to float32 before an operation and rounded to nearest even after it.
Not repaired: atomics, custom scans and clamp(propagate_nan=ALL) in bfloat16; kernels accumulate in float32 anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

BF16 = tl.bfloat16
ARITHMETIC = (np.add, np.subtract, np.multiply, np.divide, np.fmod, np.minimum, np.maximum, np.fmin, np.fmax)
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def _is_bf16(*handles: TensorHandle) -> bool:
    return any(h.dtype.scalar == BF16 for h in handles)


def _values(handle: TensorHandle) -> np.ndarray:
    """What a handle holds, bfloat16 as float32."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32) if _is_bf16(handle) else handle.data


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(_values(handle), tl.float32) if _is_bf16(handle) else handle


def _rounded(values: np.ndarray) -> TensorHandle:
    """float32 to bfloat16: to nearest even, NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), nearest), BF16)


def install() -> None:
    """Repair the interpreter of this process. Before a kernel runs; a second call does nothing."""
    if getattr(InterpreterBuilder, "_is_repaired", False):
        return
    InterpreterBuilder._is_repaired = True
    _repair_operations(InterpreterBuilder)
    _repair_reductions(ReduceOps)
    _repair_range()


def _repair_operations(builder: Any) -> None:
    binary, unary, dot, cast = builder.binary_op, builder.unary_op, builder.create_dot, builder.cast_impl
    float_to_float, fma = builder.create_fp_to_fp, builder.create_fma

    def binary_op(self: Any, left: TensorHandle, right: TensorHandle, op: Any) -> TensorHandle:
        if _is_bf16(left, right) and op in ARITHMETIC:
            return _rounded(op(_values(left), _values(right)))
        if _is_bf16(left, right) and op in COMPARISONS:
            return binary(self, _widened(left), _widened(right), op)
        return binary(self, left, right, op)

    def unary_op(self: Any, x: TensorHandle, op: Any) -> TensorHandle:
        return _rounded(op(_values(x))) if _is_bf16(x) else unary(self, x, op)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, _widened(a), _widened(b), *rest)

    def cast_impl(self: Any, x: TensorHandle, to: Any) -> TensorHandle:
        if _is_bf16(x) == (to.scalar == BF16):
            return cast(self, x, to)
        if to.scalar == BF16:
            return _rounded(x.data.astype(np.float32))
        return TensorHandle(_values(x).astype(interpreter._get_np_dtype(to)), to.scalar)

    def create_fp_to_fp(self: Any, x: TensorHandle, to: Any, rounding: Any) -> TensorHandle:
        has_bf16 = _is_bf16(x) or to.scalar == BF16
        return cast_impl(self, x, to) if has_bf16 else float_to_float(self, x, to, rounding)

    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        return _rounded(_values(x) * _values(y) + _values(z)) if _is_bf16(x, y, z) else fma(self, x, y, z)

    builder.binary_op, builder.unary_op, builder.create_dot = binary_op, unary_op, create_dot
    builder.cast_impl, builder.create_fp_to_fp, builder.create_fma = cast_impl, create_fp_to_fp, create_fma


def _repair_reductions(reductions: Any) -> None:
    reduce = reductions.apply_impl

    def narrowed(out: tl.tensor, x: tl.tensor) -> tl.tensor:
        """A float32 result of what was bfloat16."""
        if x.dtype != BF16 or out.dtype != tl.float32:
            return out
        return tl.core.tensor(
            _rounded(out.handle.data), tl.block_type(BF16, list(out.shape)) if out.type.is_block() else BF16
        )

    def apply_impl(self: Any, inputs: tuple) -> Any:
        if all(x.dtype != BF16 for x in inputs):
            return reduce(self, inputs)
        wide = tuple(self.to_tensor(_values(x.handle), tl.float32) if x.dtype == BF16 else x for x in inputs)
        out = reduce(self, wide)
        if isinstance(out, (tuple, list)):
            return tuple(narrowed(o, x) for o, x in zip(out, inputs, strict=True))
        return narrowed(out, inputs[0])

    reductions.apply_impl = apply_impl


def _repair_range() -> None:
    """Triton up to 3.6 with numpy from 2.4 on cannot make an int of a tensor of one element, as range() needs it."""
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor
