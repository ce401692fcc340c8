"""The vector type of the kernels, and how values are kept in memory: the LLVM side of `simd`.

Arithmetic is in float32 or float64. Half precision is storage only: float16 arrays reach a kernel as their bits in
uint16, bfloat16 arrays as theirs in int16, so that numba tells the two apart; loads widen to float32, stores round to
nearest even.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import lower_builtin, models, register_model, type_callable

from fastbn.cpu.kernels.half import converts, from_half, to_half
from fastbn.cpu.kernels.private import cgutils, make_array, target, volatile

VECTOR_BYTES = 64  # of arithmetic: 16 float32 or 8 float64
I16, I32, I64 = (ir.IntType(bits) for bits in (16, 32, 64))
FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()


def arithmetic(dtype: Any) -> Any:
    """The numba type that elements of an array are computed in."""
    return dtype if isinstance(dtype, types.Float) else types.float32


def itemsize(dtype: Any) -> int:
    """Bytes of an element in memory."""
    return int(dtype.bitwidth) // 8


class Vector(types.Type):  # type: ignore[misc]  # numba is untyped
    """The numba type of a 64-byte vector of float32 or float64."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = arithmetic(dtype)
        self.lanes = VECTOR_BYTES * 8 // self.dtype.bitwidth
        self.ir = ir.VectorType(FLOAT if self.dtype.bitwidth == 32 else DOUBLE, self.lanes)
        super().__init__(name=f"Vector({self.dtype} x {self.lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]  # numba is untyped
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.ir)


def _register(op: Callable[[Any, Any], Any], instruction: str) -> None:
    """Let an operator of two vectors be an instruction."""

    @type_callable(op)  # type: ignore[untyped-decorator]  # numba is untyped
    def typed(context: Any) -> Callable[[Any, Any], Any]:
        return lambda a, b: a if isinstance(a, Vector) and a == b else None

    @lower_builtin(op, Vector, Vector)  # type: ignore[untyped-decorator]  # numba is untyped
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args)


for _op, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _register(_op, _instruction)


def splat(builder: Any, value: Any, vector: ir.VectorType) -> Any:
    """The value in every lane."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count))


def pointer(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """Address of args[0][args[1]]. The last axis is contiguous.

    Its stride is a constant, which the loops' addressing folds in.
    """
    array_type, index_type = sig.args[:2]
    view = make_array(array_type)(context, builder, args[0])
    parts = cgutils.unpack_tuple(builder, args[1], len(index_type))
    parts = [context.cast(builder, part, dtype, types.intp) for part, dtype in zip(parts, index_type, strict=True)]
    offset = builder.mul(parts[-1], ir.Constant(I64, itemsize(array_type.dtype)))
    for part, stride in zip(parts[:-1], cgutils.unpack_tuple(builder, view.strides), strict=False):
        offset = builder.add(offset, builder.mul(part, stride))
    return cgutils.pointer_add(builder, view.data, offset)


def mask(builder: Any, count: Any, lanes: int) -> Any:
    """The first `count` of so many lanes."""
    vector = ir.VectorType(I32, lanes)
    return builder.icmp_unsigned(
        "<", ir.Constant(vector, list(range(lanes))), splat(builder, builder.trunc(count, I32), vector)
    )


def call(builder: Any, result: Any, name: str, arguments: list[Any], fastmath: tuple[str, ...] = ()) -> Any:
    """Call an LLVM intrinsic."""
    fn_type = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, fn_type, name), arguments, fastmath=fastmath)


def suffix(vector: ir.VectorType) -> str:
    """How LLVM names a vector type: v16f32."""
    return f"v{vector.count}{ {FLOAT: 'f32', DOUBLE: 'f64'}.get(vector.element, 'i16') }"


def storage(dtype: Any, lanes: int) -> ir.VectorType:
    """The type of so many elements in memory."""
    return ir.VectorType({types.float32: FLOAT, types.float64: DOUBLE}.get(dtype, I16), lanes)


def convert(builder: Any, vector: Any, element: Any) -> Any:
    """The same lanes as float32 or float64."""
    if vector.type.element == element:
        return vector
    change = builder.fpext if element == DOUBLE else builder.fptrunc
    return change(vector, ir.VectorType(element, vector.type.count))


def widen(context: Any, builder: Any, vector: Any, dtype: Any) -> Any:
    """Elements as loaded from an array of `dtype` -> what they are computed in."""
    lanes = vector.type.count
    if dtype == types.uint16:
        if not converts(*target(context)):
            return from_half(builder, vector)
        return builder.fpext(builder.bitcast(vector, ir.VectorType(ir.HalfType(), lanes)), ir.VectorType(FLOAT, lanes))
    if dtype == types.int16:
        wide = ir.VectorType(I32, lanes)
        bits = builder.shl(builder.zext(vector, wide), ir.Constant(wide, [16] * lanes))
        return builder.bitcast(bits, ir.VectorType(FLOAT, lanes))
    return vector


def narrow(context: Any, builder: Any, vector: Any, dtype: Any) -> Any:
    """The inverse, rounding to nearest even.

    bfloat16 by integer arithmetic: the machine's own instruction takes subnormal numbers for zero.
    """
    lanes = vector.type.count
    if dtype == types.uint16:
        if not converts(*target(context)):
            return to_half(builder, vector)
        return builder.bitcast(builder.fptrunc(vector, ir.VectorType(ir.HalfType(), lanes)), ir.VectorType(I16, lanes))
    if dtype == types.int16:
        wide = ir.VectorType(I32, lanes)

        def constant(value: int) -> Any:
            return ir.Constant(wide, [value] * lanes)

        bits = builder.bitcast(vector, wide)
        high = builder.lshr(bits, constant(16))
        rounded = builder.add(bits, builder.add(builder.and_(high, constant(1)), constant(0x7FFF)))
        quiet = builder.or_(builder.and_(high, constant(0x8000)), constant(0x7FC0))
        chosen = builder.select(
            builder.fcmp_unordered("uno", vector, vector), quiet, builder.lshr(rounded, constant(16))
        )
        return builder.trunc(chosen, ir.VectorType(I16, lanes))
    return vector


WIDE = Vector(types.float64)


def load_elements(context: Any, builder: Any, sig: Any, args: Any, lanes: int) -> Any:
    """So many elements from x[index], as they are computed."""
    dtype = sig.args[0].dtype
    return widen(context, builder, _load(builder, pointer(context, builder, sig, args), storage(dtype, lanes)), dtype)


def load_halves(context: Any, builder: Any, sig: Any, args: Any, lanes: int) -> Any:
    """The same by two loads, unless half precision makes one as short."""
    dtype = sig.args[0].dtype
    if lanes * itemsize(dtype) < VECTOR_BYTES:
        return load_elements(context, builder, sig, args, lanes)
    place, half = pointer(context, builder, sig, args), storage(dtype, lanes // 2)
    second = cgutils.pointer_add(builder, place, ir.Constant(I64, VECTOR_BYTES // 2))
    halves = [volatile(_load(builder, start, half)) for start in (place, second)]
    return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(I32, lanes), list(range(lanes))))


def _load(builder: Any, place: Any, vector: ir.VectorType) -> Any:
    loaded = builder.load(builder.bitcast(place, vector.as_pointer()), typ=vector)
    loaded.align = 1
    return loaded


def load_first(context: Any, builder: Any, sig: Any, args: Any, lanes: int) -> Any:
    """The first args[2] of so many elements, zeros behind them; and which they are."""
    dtype, first = sig.args[0].dtype, mask(builder, args[2], lanes)
    vector = storage(dtype, lanes)
    place = builder.bitcast(pointer(context, builder, sig, args), vector.as_pointer())
    arguments = [place, ir.Constant(I32, 1), first, ir.Constant(vector, None)]
    loaded = call(builder, vector, f"llvm.masked.load.{suffix(vector)}.p0", arguments)
    return widen(context, builder, loaded, dtype), first


def store_elements(context: Any, builder: Any, sig: Any, args: Any, value: Any, align: int) -> Any:
    """Store `value` to x[index] onwards; the instruction."""
    kept = narrow(context, builder, value, sig.args[0].dtype)
    instruction = builder.store(kept, builder.bitcast(pointer(context, builder, sig, args), kept.type.as_pointer()))
    instruction.align = align
    return instruction


def store_first(context: Any, builder: Any, sig: Any, args: Any, value: Any) -> None:
    """Store the first args[2] lanes of `value` to x[index] onwards."""
    kept = narrow(context, builder, value, sig.args[0].dtype)
    place = builder.bitcast(pointer(context, builder, sig, args), kept.type.as_pointer())
    arguments = [kept, place, ir.Constant(I32, 1), mask(builder, args[2], kept.type.count)]
    call(builder, ir.VoidType(), f"llvm.masked.store.{suffix(kept.type)}.p0", arguments)
