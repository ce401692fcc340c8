"""Loads, stores and arithmetic of 16-byte groups as LLVM instructions.

The only file that knows numba-cuda's compiler, with `group`.
`x` tells a function which memory it is about: a pointer to float32, float64, uint16 (float16) or int16 (bfloat16).
Indices are elements. `+`, `-`, `*` and `/` work on groups. `gpu.scalar` and `gpu.broadcast` give numbers their type: a
Python 0.0 would turn float32 into float64.
"""

from typing import Any

from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic

from fastbn.cuda.kernels.group import (  # fmt: skip
    BLOCK,
    FLOAT,
    GROUP_BYTES,
    I32,
    I64,
    SHARED,
    Group,
    arithmetic,
    few_of,
    lanes_of,
    many_of,
    putting,
    read,
    shared,
    splat,
    taking,
    write,
)


def device(function: Any) -> Any:
    """A function that kernels call."""
    return cuda.jit(device=True)(function)


@device
def block():
    """Index of this block."""
    return cuda.blockIdx.x


@device
def thread():
    """Index of this thread in its block."""
    return cuda.threadIdx.x


@device
def threads():
    """Threads of a block."""
    return cuda.blockDim.x


@device
def sync():
    """Wait for the block's other threads."""
    cuda.syncthreads()


@device
def blocks():
    """Blocks of the grid."""
    return cuda.gridDim.x


@intrinsic
def lanes(typingctx, x):
    """Elements of a group of x; a constant."""
    number = lanes_of(x)
    return types.int32(x), lambda context, builder, sig, args: ir.Constant(I32, number)


@intrinsic
def quotient(typingctx, value, divisor):
    """value // divisor of numbers that are not negative.

    In 32 bits where the divisor has so many, for both then fit.
    """

    def codegen(context, builder, sig, args):
        if divisor.bitwidth == 64:
            return builder.udiv(args[0], args[1])
        return builder.zext(builder.udiv(builder.trunc(args[0], I32), args[1]), I64)

    return types.int64(types.int64, divisor), codegen


@intrinsic
def scalar(typingctx, x, value):
    """A number as x is computed in."""
    kind = arithmetic(x.dtype)
    return kind(x, kind), lambda context, builder, sig, args: args[1]


@intrinsic
def broadcast(typingctx, x, value):
    """A number in every lane of a group of x."""
    group = Group(x.dtype)
    return group(x, group.dtype), lambda context, builder, sig, args: splat(builder, args[1], group.ir)


@intrinsic
def load(typingctx, x, index):
    """x[index] as it is computed in."""

    def codegen(context, builder, sig, args):
        return builder.extract_element(read(builder, *args, x.dtype, 1), ir.Constant(I32, 0))

    return arithmetic(x.dtype)(x, types.int64), codegen


@intrinsic
def store(typingctx, x, index, value):
    """x[index] = value."""

    def codegen(context, builder, sig, args):
        kind = ir.VectorType(args[2].type, 1)
        write(
            builder,
            args[0],
            args[1],
            x.dtype,
            builder.insert_element(ir.Constant(kind, ir.Undefined), args[2], ir.Constant(I32, 0)),
        )
        return context.get_dummy_value()

    return types.none(x, types.int64, arithmetic(x.dtype)), codegen


@intrinsic
def load_group(typingctx, x, index):
    """The group from x[index] on, in one load: the address is a multiple of 16 bytes."""
    group = Group(x.dtype)
    return group(x, types.int64), lambda context, builder, sig, args: read(builder, *args, x.dtype, group.lanes)


@intrinsic
def store_group(typingctx, x, index, group):
    """A group to x[index] onwards, in one store: the address is a multiple of 16 bytes."""

    def codegen(context, builder, sig, args):
        write(builder, args[0], args[1], x.dtype, args[2])
        return context.get_dummy_value()

    return types.none(x, types.int64, Group(x.dtype)), codegen


@intrinsic
def load_any(typingctx, x, index, count):
    """The first `count` lanes of a group from x[index] on, wherever it lies, one by one; zeros behind them."""
    group = Group(x.dtype)

    def codegen(context, builder, sig, args):
        vector: Any = ir.Constant(group.ir, None)
        for k in range(group.lanes):
            before = builder.block
            with builder.if_then(builder.icmp_signed(">", args[2], ir.Constant(I32, k))):
                at = builder.add(args[1], ir.Constant(I64, k))
                value = builder.extract_element(read(builder, args[0], at, x.dtype, 1), ir.Constant(I32, 0))
                more = builder.insert_element(vector, value, ir.Constant(I32, k))
                inside = builder.block
            joined = builder.phi(group.ir)
            joined.add_incoming(vector, before)
            joined.add_incoming(more, inside)
            vector = joined
        return vector

    return group(x, types.int64, types.int32), codegen


@intrinsic
def store_any(typingctx, x, index, count, group):
    """The first `count` lanes of a group, of whatever memory, to x[index] onwards, wherever it lies, one by one."""

    def codegen(context, builder, sig, args):
        for k in range(group.lanes):
            with builder.if_then(builder.icmp_signed(">", args[2], ir.Constant(I32, k))):
                lane = ir.Constant(ir.VectorType(I32, 1), [k])
                one = builder.shuffle_vector(args[3], ir.Constant(group.ir, ir.Undefined), lane)
                write(builder, args[0], builder.add(args[1], ir.Constant(I64, k)), x.dtype, one)
        return context.get_dummy_value()

    return types.none(x, types.int64, types.int32, group), codegen


@intrinsic
def load_table(typingctx, x, table, index):
    """As many numbers of `table` from an index on as a group of x has lanes: the address is a multiple of 16 bytes."""
    group = Group(x.dtype)

    def codegen(context, builder, sig, args):
        per = GROUP_BYTES * 8 // group.dtype.bitwidth  # in one load
        parts = [
            read(builder, args[1], builder.add(args[2], ir.Constant(I64, k)), table.dtype, per)
            for k in range(0, group.lanes, per)
        ]
        if len(parts) == 1:
            return parts[0]
        return builder.shuffle_vector(*parts, ir.Constant(ir.VectorType(I32, group.lanes), list(range(group.lanes))))

    return group(x, table, types.int64), codegen


@intrinsic
def gather(typingctx, x, table, at, channel, column, columns, channels):
    """A channel's number, from table[at] on.

    For each lane of x, the first of which is `column` of its channel's `columns`.
    """
    group, number = Group(x.dtype), types.int64

    def codegen(context, builder, sig, args):
        _, base, at, c, s, columns, channels = args
        vector: Any = ir.Constant(group.ir, ir.Undefined)
        zero, one = ir.Constant(I64, 0), ir.Constant(I64, 1)
        for k in range(group.lanes):
            value = builder.extract_element(
                read(builder, base, builder.add(at, c), table.dtype, 1), ir.Constant(I32, 0)
            )
            if table.dtype.bitwidth != group.dtype.bitwidth:
                narrower = table.dtype.bitwidth > group.dtype.bitwidth
                value = (builder.fptrunc if narrower else builder.fpext)(value, group.ir.element)
            vector = builder.insert_element(vector, value, ir.Constant(I32, k))
            s = builder.add(s, one)
            over = builder.icmp_signed("==", s, columns)
            s = builder.select(over, zero, s)
            c = builder.select(over, builder.add(c, one), c)
            c = builder.select(builder.icmp_signed("==", c, channels), zero, c)
        return vector

    return group(x, table, number, number, number, number, number), codegen


@intrinsic
def split(typingctx, x, low, high, count):
    """One number in the first `count` lanes of a group of x, another in the others."""
    group = Group(x.dtype)

    def codegen(context, builder, sig, args):
        lanes = ir.Constant(ir.VectorType(I32, group.lanes), list(range(group.lanes)))
        first = builder.icmp_signed("<", lanes, splat(builder, args[3], lanes.type))
        return builder.select(first, splat(builder, args[1], group.ir), splat(builder, args[2], group.ir))

    return group(x, group.dtype, group.dtype, types.int32), codegen


@intrinsic
def total(typingctx, group):
    """Sum of the lanes, by halves."""

    def codegen(context, builder, sig, args):
        values = [builder.extract_element(args[0], ir.Constant(I32, k)) for k in range(group.lanes)]
        while len(values) > 1:
            half = len(values) // 2
            values = [builder.fadd(a, b) for a, b in zip(values[:half], values[half:], strict=True)]
        return values[0]

    return group.dtype(group), codegen


@intrinsic
def inverse(typingctx, value):
    """1 / value, within a unit in the last place for float32."""

    def codegen(context, builder, sig, args):
        if value.bitwidth == 64:
            return builder.fdiv(ir.Constant(args[0].type, 1.0), args[0])
        asm = ir.InlineAsm(ir.FunctionType(FLOAT, [FLOAT]), "rcp.approx.f32 $0, $1;", "=f,f")
        return builder.call(asm, [args[0]])

    return value(value), codegen


@intrinsic
def half(typingctx, value):
    """0.5 in the type of a number."""
    return value(value), lambda context, builder, sig, args: ir.Constant(args[0].type, 0.5)


@intrinsic
def first(typingctx, group):
    """The first lane."""
    return group.dtype(group), lambda context, builder, sig, args: builder.extract_element(args[0], ir.Constant(I32, 0))


@intrinsic
def few(typingctx, x):
    """Slots of the array with one for each thread; a constant."""
    return types.int32(x), lambda context, builder, sig, args: ir.Constant(I32, BLOCK)


@intrinsic
def many(typingctx, x):
    """Slots of the array with one for each lane of each thread; a constant."""
    number = BLOCK * lanes_of(x)
    return types.int32(x), lambda context, builder, sig, args: ir.Constant(I32, number)


@intrinsic
def put(typingctx, x, index, value):
    """Keep a number of x's arithmetic in shared memory, in the array of few."""
    return types.none(x, types.int32, arithmetic(x.dtype)), putting(few_of(x))


@intrinsic
def take(typingctx, x, index):
    """A number from the array of few."""
    return arithmetic(x.dtype)(x, types.int32), taking(few_of(x))


@intrinsic
def put_lane(typingctx, x, index, value):
    """Keep a number of x's arithmetic in shared memory, in the array of many."""
    return types.none(x, types.int32, arithmetic(x.dtype)), putting(many_of(x))


@intrinsic
def take_lane(typingctx, x, index):
    """A number from the array of many."""
    return arithmetic(x.dtype)(x, types.int32), taking(many_of(x))


@intrinsic
def put_group(typingctx, x, index, group):
    """A group of x to the array of many, from a multiple of its lanes on."""
    kind = Group(x.dtype)

    def codegen(context, builder, sig, args):
        at = builder.bitcast(shared(builder, many_of(x), args[1]), ir.PointerType(kind.ir, SHARED))
        builder.store(args[2], at).align = GROUP_BYTES
        return context.get_dummy_value()

    return types.none(x, types.int32, kind), codegen


@intrinsic
def take_group(typingctx, x, index):
    """A group from there."""
    kind = Group(x.dtype)

    def codegen(context, builder, sig, args):
        loaded = builder.load(
            builder.bitcast(shared(builder, many_of(x), args[1]), ir.PointerType(kind.ir, SHARED)), typ=kind.ir
        )
        loaded.align = GROUP_BYTES
        return loaded

    return kind(x, types.int32), codegen
