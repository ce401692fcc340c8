"""Explicit vectors for kernels: loads, stores and arithmetic of 64-byte vectors, written as LLVM instructions.

LLVM's own vectorizer is not enough here: it keeps no accumulators in registers across rows, gives an in-place call the
scalar loop (its overlap check fails), runs up to 15 scalar steps at the end of every short row, and never emits a
streaming store. With a vector type the kernels say what they mean, and compile in half the time.

A vector has lanes(x) elements: 16 where x is computed in float32, 8 of float64. On narrower machines LLVM splits it.
`+`, `-`, `*` and `/` work on vectors. Positions are index tuples of a strided array whose last axis is contiguous;
alignment of one element is enough. Wide vectors are of 8 float64, whatever the array. With NUMBA_DISABLE_JIT=1 a vector
is a small NumPy array.
"""

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from fastbn.cpu.kernels.jit import DISABLED, leaf
from fastbn.cpu.kernels.vector import (
    DOUBLE,
    FLOAT,
    I32,
    I64,
    WIDE,
    Vector,
    call,
    convert,
    itemsize,
    load_elements,
    load_first,
    load_halves,
    mask,
    pointer,
    splat,
    store_elements,
    store_first,
    suffix,
)


@intrinsic
def lanes(typingctx, x):
    """Elements of one vector of x: how far a kernel steps; a constant."""

    def codegen(context, builder, sig, args):
        return ir.Constant(I64, Vector(x.dtype).lanes)

    return types.intp(x), codegen


@intrinsic
def bytes_of(typingctx, x):
    """Bytes of an element of x in memory; a constant, where x.itemsize would be read at run time."""

    def codegen(context, builder, sig, args):
        return ir.Constant(I64, itemsize(x.dtype))

    return types.intp(x), codegen


@intrinsic
def scalar(typingctx, x, value):
    """A float64 rounded to what x is computed in."""
    dtype = Vector(x.dtype).dtype

    def codegen(context, builder, sig, args):
        return args[1]

    return dtype(x, dtype), codegen


@intrinsic
def element(typingctx, x, index):
    """x[index] in float64; no index counts from the end, as NumPy's may."""

    def codegen(context, builder, sig, args):
        return builder.extract_element(
            convert(builder, load_elements(context, builder, sig, args, 1), DOUBLE), ir.Constant(I32, 0)
        )

    return types.float64(x, index), codegen


@intrinsic
def load(typingctx, x, index):
    """Vector at x[index]."""
    vector = Vector(x.dtype)

    def codegen(context, builder, sig, args):
        return load_elements(context, builder, sig, args, vector.lanes)

    return vector(x, index), codegen


@intrinsic
def load_far(typingctx, x, index):
    """The same by two loads, where x is read along the memory and is not in a core's own cache."""
    # Zen 4 fetches ahead better for two loads of a line: y from x in the last-level cache gains 8 to 18 %, the sums of
    # dy and dy * xhat of rows of 64, 128 or 256 columns 5 to 10 % (192: lose 2 to 9 %). Streaming stores hide it, and
    # sums over 4 rows at a time lose 10 %.
    vector = Vector(x.dtype)

    def codegen(context, builder, sig, args):
        return load_halves(context, builder, sig, args, vector.lanes)

    return vector(x, index), codegen


@intrinsic
def load_some(typingctx, x, index, count, fill):
    """The first `count` lanes from x[index], the others from `fill`; memory beyond is not touched."""
    vector = Vector(x.dtype)

    def codegen(context, builder, sig, args):
        loaded, some = load_first(context, builder, sig, args, vector.lanes)
        return builder.select(some, loaded, args[3])

    return vector(x, index, types.intp, vector), codegen


@intrinsic
def store(typingctx, x, index, value):
    """x[index] onwards = value."""

    def codegen(context, builder, sig, args):
        store_elements(context, builder, sig, args, args[2], 1)
        return context.get_dummy_value()

    return types.void(x, index, value), codegen


@intrinsic
def store_stream(typingctx, x, index, value):
    """The same past the cache; x[index] lies on a boundary of a whole vector's bytes. `fence` before others read it."""

    def codegen(context, builder, sig, args):
        instruction = store_elements(context, builder, sig, args, args[2], value.lanes * itemsize(x.dtype))
        instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))
        return context.get_dummy_value()

    return types.void(x, index, value), codegen


@intrinsic
def store_some(typingctx, x, index, count, value):
    """The first `count` lanes of value to x[index]; memory beyond is not touched."""

    def codegen(context, builder, sig, args):
        store_first(context, builder, sig, args, args[3])
        return context.get_dummy_value()

    return types.void(x, index, types.intp, value), codegen


@intrinsic
def broadcast(typingctx, x, value):
    """The value in every lane of a vector of x."""
    vector = Vector(x.dtype)

    def codegen(context, builder, sig, args):
        return splat(builder, args[1], vector.ir)

    return vector(x, vector.dtype), codegen


@intrinsic
def load_broadcast(typingctx, x, index):
    """The element x[index] of a float array in every lane."""
    vector = Vector(x.dtype)

    def codegen(context, builder, sig, args):
        return splat(
            builder,
            builder.extract_element(load_elements(context, builder, sig, args, 1), ir.Constant(I32, 0)),
            vector.ir,
        )

    return vector(x, index), codegen


@intrinsic
def splice(typingctx, a, count, b):
    """The first `count` lanes of the vector a, the others of b."""

    def codegen(context, builder, sig, args):
        return builder.select(mask(builder, args[1], a.lanes), args[0], args[2])

    return a(a, types.intp, a), codegen


@intrinsic
def muladd(typingctx, a, b, c):
    """The vector a * b + c, fused where the machine can."""

    def codegen(context, builder, sig, args):
        return call(builder, a.ir, f"llvm.fmuladd.{suffix(a.ir)}", list(args))

    return a(a, a, a), codegen


@intrinsic
def quiet(typingctx, a):
    """The vector with one NaN for all.

    Which of two operands gives a machine's NaN its sign depends on how LLVM orders them.
    """

    def codegen(context, builder, sig, args):
        nan = ir.Constant(a.ir, [float("nan")] * a.lanes)
        return builder.select(builder.fcmp_unordered("uno", args[0], args[0]), nan, args[0])

    return a(a), codegen


@intrinsic
def total(typingctx, a):
    """Sum of the lanes, pairwise."""

    def codegen(context, builder, sig, args):
        arguments = [ir.Constant(a.ir.element, -0.0), args[0]]
        return call(builder, a.ir.element, f"llvm.vector.reduce.fadd.{suffix(a.ir)}", arguments, ("reassoc",))

    return a.dtype(a), codegen


@intrinsic
def load_wide(typingctx, x, index, count):
    """The first `count` of eight elements from x[index], as a wide vector with zeros behind them."""

    def codegen(context, builder, sig, args):
        return convert(builder, load_first(context, builder, sig, args, WIDE.lanes)[0], DOUBLE)

    return WIDE(x, index, types.intp), codegen


@intrinsic
def store_wide(typingctx, x, index, count, value):
    """The first `count` lanes of a wide vector to x[index] onwards, rounded to the dtype of a float array x."""

    def codegen(context, builder, sig, args):
        store_first(context, builder, sig, args, convert(builder, args[3], Vector(x.dtype).ir.element))
        return context.get_dummy_value()

    return types.void(x, index, types.intp, WIDE), codegen


@intrinsic
def rounded(typingctx, x, value):
    """A wide vector rounded to what x is computed in, as a wide vector."""

    def codegen(context, builder, sig, args):
        return convert(builder, convert(builder, args[1], Vector(x.dtype).ir.element), DOUBLE)

    return WIDE(x, WIDE), codegen


@intrinsic
def wide(typingctx, value):
    """The float64 in every lane of a wide vector."""

    def codegen(context, builder, sig, args):
        return splat(builder, args[0], WIDE.ir)

    return WIDE(types.float64), codegen


@intrinsic
def root(typingctx, a):
    """Square root of each lane."""

    def codegen(context, builder, sig, args):
        return call(builder, a.ir, f"llvm.sqrt.{suffix(a.ir)}", list(args))

    return a(a), codegen


@intrinsic
def rough_root(typingctx, a):
    """The same within 7 %, by halving the exponent.

    Two integer steps, where a root of 8 lanes takes 20 cycles. 0 becomes tiny.
    """
    word, one = (I32, 0x3F800000) if a.ir.element == FLOAT else (I64, 0x3FF0000000000000)

    def codegen(context, builder, sig, args):
        words = ir.VectorType(word, a.lanes)
        half = builder.lshr(builder.bitcast(args[0], words), ir.Constant(words, [1] * a.lanes))
        return builder.bitcast(builder.add(half, ir.Constant(words, [one // 2] * a.lanes)), a.ir)

    return a(a), codegen


@intrinsic
def not_negative(typingctx, a):
    """Each lane, 0 where it is below; NaN stays NaN."""

    def codegen(context, builder, sig, args):
        zero = ir.Constant(a.ir, None)
        return builder.select(builder.fcmp_ordered("<", args[0], zero), zero, args[0])

    return a(a), codegen


def _inside(builder: Any, value: Any, low: Any, high: Any) -> Any:
    limits = [splat(builder, limit, WIDE.ir) for limit in (low, high)]
    return builder.and_(builder.fcmp_ordered(">", value, limits[0]), builder.fcmp_ordered("<", value, limits[1]))


@intrinsic
def within(typingctx, a, count, low, high):
    """Whether low < lane < high for the first `count` lanes of a wide vector."""

    def codegen(context, builder, sig, args):
        beyond = builder.not_(mask(builder, args[1], WIDE.lanes))
        every = builder.or_(_inside(builder, args[0], *args[2:]), beyond)
        return builder.icmp_unsigned(
            "==", builder.bitcast(every, ir.IntType(WIDE.lanes)), ir.Constant(ir.IntType(WIDE.lanes), 2**WIDE.lanes - 1)
        )

    return types.boolean(WIDE, types.intp, types.float64, types.float64), codegen


@intrinsic
def choose(typingctx, a, low, high, inside, outside):
    """Each lane of `inside` where low < a < high, else of `outside`; all wide vectors."""

    def codegen(context, builder, sig, args):
        return builder.select(_inside(builder, *args[:3]), *args[3:])

    return WIDE(WIDE, types.float64, types.float64, WIDE, WIDE), codegen


@intrinsic
def _pointer(typingctx, like, address):
    """An address as a pointer to elements of `like`."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[1], context.get_value_type(sig.return_type))

    return types.CPointer(like.dtype)(like, address), codegen


@leaf
def at(like, address, shape):
    """The array of elements of `like` at an address, without gaps."""
    return carray(_pointer(like, address), shape)


@intrinsic
def address(typingctx, x, index):
    """Address of x[index], in bytes."""

    def codegen(context, builder, sig, args):
        return builder.ptrtoint(pointer(context, builder, sig, args), I64)

    return types.intp(x, index), codegen


@intrinsic
def prefetch(typingctx, x, index):
    """Bring x[index] into the second-level cache; any address will do."""

    def codegen(context, builder, sig, args):
        place = builder.bitcast(pointer(context, builder, sig, args), ir.IntType(8).as_pointer())
        hints = [ir.Constant(I32, hint) for hint in (0, 2, 1)]  # to read, second level, data
        call(builder, ir.VoidType(), "llvm.prefetch.p0", [place, *hints])
        return context.get_dummy_value()

    return types.void(x, index), codegen


@intrinsic
def fence(typingctx):
    """Make this thread's streaming stores visible before anything that follows."""

    def codegen(context, builder, sig, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


if DISABLED:
    # all that plain.py lists, each in the place of the intrinsic of its name
    from fastbn.cpu.kernels.plain import *  # noqa: F403
