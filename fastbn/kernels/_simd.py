"""Explicit vectors for kernels: one 64-byte vector type, its loads and stores, written as LLVM instructions.

LLVM's own vectorizer is not enough here: it keeps no accumulators in registers across rows, gives an in-place call the scalar loop
(its overlap check fails), runs up to 15 scalar steps at the end of every short row, and never emits a streaming store. With a vector
type the kernels say what they mean, and compile in half the time.

A vector has `lanes(dtype)` elements: 16 of float32, 8 of float64. On narrower machines LLVM splits it. `+`, `-` and `*` work on
vectors. Positions are index tuples of a strided array whose last axis is contiguous; alignment of one element is enough.
With NUMBA_DISABLE_JIT=1 a vector is a small NumPy array and the same kernels run as plain Python.
"""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

VECTOR_BYTES = 64


def lanes(dtype: Any) -> int:
    """Elements of one vector: how far a kernel steps."""
    return VECTOR_BYTES // np.dtype(dtype).itemsize


class Vector(types.Type):
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

    @lower_builtin(op, Vector, Vector)
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args)


for _op, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _register(_op, _instruction)


def _splat(builder: Any, value: Any, vector: ir.VectorType) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    i32 = ir.IntType(32)
    first = builder.insert_element(undefined, value, ir.Constant(i32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(i32, vector.count), [0] * vector.count))


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index_type: Any, index: Any) -> Any:
    view = make_array(array_type)(context, builder, array)
    parts = cgutils.unpack_tuple(builder, index, len(index_type))
    parts = [context.cast(builder, part, kind, types.intp) for part, kind in zip(parts, index_type, strict=True)]
    return cgutils.get_item_pointer2(
        context,
        builder,
        view.data,
        cgutils.unpack_tuple(builder, view.shape),
        cgutils.unpack_tuple(builder, view.strides),
        "A",
        parts,
    )


def _mask(context: Any, builder: Any, kind: Vector, first: Any, count: Any) -> Any:
    """Lanes first <= lane < first + count."""
    i32 = ir.IntType(32)
    row = ir.VectorType(i32, kind.lanes)
    lane = ir.Constant(row, list(range(kind.lanes)))
    start = _splat(builder, builder.trunc(first, i32), row)
    size = _splat(builder, builder.trunc(count, i32), row)
    return builder.icmp_unsigned("<", builder.sub(lane, start), size)


def _vector_pointer(builder: Any, pointer: Any, kind: Vector) -> Any:
    return builder.bitcast(pointer, kind.ir.as_pointer())


def _masked(builder: Any, kind: Vector, what: str, arguments: list[Any]) -> Any:
    suffix = f"v{kind.lanes}f{kind.dtype.bitwidth}.p0"
    result = kind.ir if what == "load" else ir.VoidType()
    fn_type = ir.FunctionType(result, [a.type for a in arguments])
    fn = cgutils.get_or_insert_function(builder.module, fn_type, f"llvm.masked.{what}.{suffix}")
    return builder.call(fn, arguments)


@intrinsic
def _load(typingctx, x, index):  # type: ignore[no-untyped-def]
    kind = Vector(x.dtype)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        pointer = _pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        loaded = builder.load(_vector_pointer(builder, pointer, kind), typ=kind.ir)
        loaded.align = 1
        return loaded

    return kind(x, index), codegen


@intrinsic
def _load_some(typingctx, x, index, count, fill):  # type: ignore[no-untyped-def]
    kind = Vector(x.dtype)
    sig = kind(x, index, types.intp, kind)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        pointer = _pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        mask = _mask(context, builder, kind, ir.Constant(ir.IntType(64), 0), args[2])
        align = ir.Constant(ir.IntType(32), 1)
        return _masked(builder, kind, "load", [_vector_pointer(builder, pointer, kind), align, mask, args[3]])

    return sig, codegen


@intrinsic
def _store(typingctx, x, index, value):  # type: ignore[no-untyped-def]
    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        pointer = _pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        builder.store(args[2], _vector_pointer(builder, pointer, sig.args[2])).align = 1
        return context.get_dummy_value()

    return types.void(x, index, value), codegen


@intrinsic
def _store_stream(typingctx, x, index, value):  # type: ignore[no-untyped-def]
    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        pointer = _pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        store = builder.store(args[2], _vector_pointer(builder, pointer, sig.args[2]))
        store.align = VECTOR_BYTES
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(x, index, value), codegen


@intrinsic
def _store_some(typingctx, x, index, value, count):  # type: ignore[no-untyped-def]
    sig = types.void(x, index, value, types.intp)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        kind = sig.args[2]
        pointer = _pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        mask = _mask(context, builder, kind, ir.Constant(ir.IntType(64), 0), args[3])
        align = ir.Constant(ir.IntType(32), 1)
        _masked(builder, kind, "store", [args[2], _vector_pointer(builder, pointer, kind), align, mask])
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def _spread(typingctx, x, value):  # type: ignore[no-untyped-def]
    kind = Vector(x.dtype)
    sig = kind(x, kind.dtype)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return _splat(builder, args[1], kind.ir)

    return sig, codegen


@intrinsic
def _muladd(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        fn_type = ir.FunctionType(a.ir, [a.ir] * 3)
        name = f"llvm.fmuladd.v{a.lanes}f{a.dtype.bitwidth}"
        return builder.call(cgutils.get_or_insert_function(builder.module, fn_type, name), args)

    return a(a, a, a), codegen


@intrinsic
def _total(typingctx, a):  # type: ignore[no-untyped-def]
    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        element = a.ir.element
        fn_type = ir.FunctionType(element, [element, a.ir])
        name = f"llvm.vector.reduce.fadd.v{a.lanes}f{a.dtype.bitwidth}"
        fn = cgutils.get_or_insert_function(builder.module, fn_type, name)
        return builder.call(fn, [ir.Constant(element, -0.0), args[0]], fastmath=("reassoc",))

    return a.dtype(a), codegen


@intrinsic
def _address(typingctx, x, index):  # type: ignore[no-untyped-def]
    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        pointer = _pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        return builder.ptrtoint(pointer, ir.IntType(64))

    return types.intp(x, index), codegen


@intrinsic
def _fence(typingctx):  # type: ignore[no-untyped-def]
    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen
