"""Explicit vectors for kernels: one 64-byte vector type, its loads and stores, written as LLVM instructions.

LLVM's own vectorizer is not enough here: it keeps no accumulators in registers across rows, gives an in-place call the scalar loop
(its overlap check fails), runs up to 15 scalar steps at the end of every short row, and never emits a streaming store. With a vector
type the kernels say what they mean, and compile in half the time.

A vector has lanes(x) elements: 16 of float32, 8 of float64. On narrower machines LLVM splits it. `+`, `-`, `*` and `/` work on
vectors. Positions are index tuples of a strided array whose last axis is contiguous; alignment of one element is enough.
With NUMBA_DISABLE_JIT=1 a vector is a small NumPy array and the same kernels run as plain Python.
"""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from fastbn.kernels._jit import DISABLED

VECTOR_BYTES = 64


class Vector(types.Type):  # type: ignore[misc]  # numba is untyped
    """The numba type of a 64-byte vector of float32 or float64."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        self.lanes = VECTOR_BYTES * 8 // dtype.bitwidth
        self.ir = ir.VectorType(ir.FloatType() if dtype.bitwidth == 32 else ir.DoubleType(), self.lanes)
        super().__init__(name=f"Vector({dtype} x {self.lanes})")


@register_default(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]  # numba is untyped
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.ir)


class _Elementwise(AbstractTemplate):  # type: ignore[misc]  # numba is untyped
    def generic(self, args: tuple[Any, ...], kws: dict[str, Any]) -> Any:
        if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
            return signature(args[0], *args)
        return None


def _register(op: Callable[[Any, Any], Any], instruction: str) -> None:
    infer_global(op)(type(f"_{instruction}", (_Elementwise,), {}))

    @lower_builtin(op, Vector, Vector)  # type: ignore[untyped-decorator]  # numba is untyped
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args)


for _op, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
    _register(_op, _instruction)


def _splat(builder: Any, value: Any, vector: ir.VectorType) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    i32 = ir.IntType(32)
    first = builder.insert_element(undefined, value, ir.Constant(i32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(i32, vector.count), [0] * vector.count))


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index_type: Any, index: Any) -> Any:
    """Address of array[index]. The last axis is contiguous: its stride is a constant, which the loops' addressing folds in."""
    view = make_array(array_type)(context, builder, array)
    parts = cgutils.unpack_tuple(builder, index, len(index_type))
    parts = [context.cast(builder, part, kind, types.intp) for part, kind in zip(parts, index_type, strict=True)]
    offset = builder.mul(parts[-1], ir.Constant(ir.IntType(64), array_type.dtype.bitwidth // 8))
    for part, stride in zip(parts[:-1], cgutils.unpack_tuple(builder, view.strides), strict=False):
        offset = builder.add(offset, builder.mul(part, stride))
    return cgutils.pointer_add(builder, view.data, offset)


def _where(kind: Vector) -> tuple[Any, Any]:
    return ir.Constant(ir.VectorType(ir.IntType(32), kind.lanes), list(range(kind.lanes))), ir.Constant(ir.IntType(32), 1)


def _mask(builder: Any, kind: Vector, count: Any) -> Any:
    """The first `count` lanes."""
    lane, _ = _where(kind)
    return builder.icmp_unsigned("<", lane, _splat(builder, builder.trunc(count, ir.IntType(32)), lane.type))


def _vector_pointer(context: Any, builder: Any, kind: Vector, sig: Any, args: Any) -> Any:
    """Where sig's first two arguments, an array and an index, point."""
    return builder.bitcast(_pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1]), kind.ir.as_pointer())


def _call(builder: Any, result: Any, name: str, arguments: list[Any], fastmath: tuple[str, ...] = ()) -> Any:
    fn_type = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, fn_type, name), arguments, fastmath=fastmath)


def _suffix(vector: Any) -> str:
    return f"v{vector.count}{'f32' if vector.element == ir.FloatType() else 'f64'}"


@intrinsic
def lanes(typingctx, x):
    """Elements of one vector of x's dtype: how far a kernel steps; a constant, where x.itemsize would be read at run time."""

    def codegen(context, builder, sig, args):
        return ir.Constant(ir.IntType(64), Vector(x.dtype).lanes)

    return types.intp(x), codegen


@intrinsic
def load(typingctx, x, index):
    """Vector at x[index]."""
    kind = Vector(x.dtype)

    def codegen(context, builder, sig, args):
        loaded = builder.load(_vector_pointer(context, builder, kind, sig, args), typ=kind.ir)
        loaded.align = 1
        return loaded

    return kind(x, index), codegen


@intrinsic
def load_some(typingctx, x, index, count, fill):
    """The first `count` lanes from x[index], the others from `fill`; memory beyond is not touched."""
    kind = Vector(x.dtype)

    def codegen(context, builder, sig, args):
        pointer = _vector_pointer(context, builder, kind, sig, args)
        arguments = [pointer, _where(kind)[1], _mask(builder, kind, args[2]), args[3]]
        return _call(builder, kind.ir, f"llvm.masked.load.{_suffix(kind.ir)}.p0", arguments)

    return kind(x, index, types.intp, kind), codegen


@intrinsic
def store(typingctx, x, index, value):
    """x[index] onwards = value."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], _vector_pointer(context, builder, value, sig, args)).align = 1
        return context.get_dummy_value()

    return types.void(x, index, value), codegen


@intrinsic
def store_stream(typingctx, x, index, value):
    """The same past the cache; x[index] lies on a 64-byte boundary. `fence` before others read it."""

    def codegen(context, builder, sig, args):
        stored = builder.store(args[2], _vector_pointer(context, builder, value, sig, args))
        stored.align = VECTOR_BYTES
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(x, index, value), codegen


@intrinsic
def store_some(typingctx, x, index, count, value):
    """The first `count` lanes of value to x[index]; memory beyond is not touched."""

    def codegen(context, builder, sig, args):
        pointer = _vector_pointer(context, builder, value, sig, args)
        arguments = [args[3], pointer, _where(value)[1], _mask(builder, value, args[2])]
        _call(builder, ir.VoidType(), f"llvm.masked.store.{_suffix(value.ir)}.p0", arguments)
        return context.get_dummy_value()

    return types.void(x, index, types.intp, value), codegen


@intrinsic
def spread(typingctx, x, value):
    """The value in every lane of a vector of x's dtype."""
    kind = Vector(x.dtype)

    def codegen(context, builder, sig, args):
        return _splat(builder, args[1], kind.ir)

    return kind(x, kind.dtype), codegen


@intrinsic
def broadcast(typingctx, x, index):
    """The element x[index] in every lane; no index counts from the end, as NumPy's may."""
    kind = Vector(x.dtype)

    def codegen(context, builder, sig, args):
        pointer = _pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        pointer = builder.bitcast(pointer, kind.ir.element.as_pointer())
        return _splat(builder, builder.load(pointer, typ=kind.ir.element), kind.ir)

    return kind(x, index), codegen


@intrinsic
def muladd(typingctx, a, b, c):
    """The vector a * b + c, fused where the machine can."""

    def codegen(context, builder, sig, args):
        return _call(builder, a.ir, f"llvm.fmuladd.{_suffix(a.ir)}", list(args))

    return a(a, a, a), codegen


def _reduce(builder: Any, vector: Any) -> Any:
    start = ir.Constant(vector.type.element, -0.0)
    return _call(builder, start.type, f"llvm.vector.reduce.fadd.{_suffix(vector.type)}", [start, vector], ("reassoc",))


@intrinsic
def total(typingctx, a):
    """Sum of the lanes, pairwise."""

    def codegen(context, builder, sig, args):
        return _reduce(builder, args[0])

    return a.dtype(a), codegen


@intrinsic
def wide_sums(typingctx, a, shift):
    """(sum, sum of squares) of a - shift over the lanes, all in float64."""

    def codegen(context, builder, sig, args):
        double = ir.VectorType(ir.DoubleType(), a.lanes)
        wide = [v if v.type == double else builder.fpext(v, double) for v in args]
        d = builder.fsub(*wide)
        sums = [_reduce(builder, d), _reduce(builder, builder.fmul(d, d))]
        return context.make_tuple(builder, sig.return_type, sums)

    return types.UniTuple(types.float64, 2)(a, a), codegen


WIDE = Vector(types.float64)


def _convert(builder: Any, vector: Any, element: Any) -> Any:
    """The same lanes as another floating-point type."""
    if vector.type.element == element:
        return vector
    convert = builder.fpext if element == ir.DoubleType() else builder.fptrunc
    return convert(vector, ir.VectorType(element, vector.type.count))


@intrinsic
def load_wide(typingctx, x, index):
    """Eight elements from x[index], as a vector of float64."""

    def codegen(context, builder, sig, args):
        pointer = _pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        eight = ir.VectorType(Vector(x.dtype).ir.element, WIDE.lanes)
        loaded = builder.load(builder.bitcast(pointer, eight.as_pointer()), typ=eight)
        loaded.align = 1
        return _convert(builder, loaded, ir.DoubleType())

    return WIDE(x, index), codegen


@intrinsic
def store_narrow(typingctx, x, index, value):
    """Eight elements from x[index] onwards = a vector of float64, rounded to the dtype of x."""

    def codegen(context, builder, sig, args):
        pointer = _pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        narrow = _convert(builder, args[2], Vector(x.dtype).ir.element)
        builder.store(narrow, builder.bitcast(pointer, narrow.type.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(x, index, WIDE), codegen


@intrinsic
def address(typingctx, x, index):
    """Address of x[index], in bytes."""

    def codegen(context, builder, sig, args):
        return builder.ptrtoint(_pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1]), ir.IntType(64))

    return types.intp(x, index), codegen


@intrinsic
def fence(typingctx):
    """Make this thread's streaming stores visible before anything that follows."""

    def codegen(context, builder, sig, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


if DISABLED:
    from fastbn.kernels._plain import (
        address,
        broadcast,
        fence,
        lanes,
        load,
        load_some,
        load_wide,
        muladd,
        spread,
        store,
        store_narrow,
        store_some,
        store_stream,
        total,
        wide_sums,
    )
