"""The vector type of the GPU kernels, how its lanes are kept in memory, and shared memory: the LLVM side of `device`.

A group is what 16 bytes of memory hold: 4 float32, 2 float64, 8 of half precision. Arithmetic is in float32 or float64;
float16 memory is seen as its bits in uint16, bfloat16 memory as its bits in int16, so that the two are told apart.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.cuda import types

from fastbn.cuda.kernels.private import interface

typings, lowerings = interface("numba.cuda.cudadecl.registry"), interface("numba.cuda.cudaimpl.registry")
PrimitiveModel: Any = interface("numba.cuda.datamodel.PrimitiveModel")
register_model = interface("numba.cuda.models.register_model")
AbstractTemplate: Any = interface("numba.cuda.typing.templates.AbstractTemplate")
signature = interface("numba.cuda.typing.templates.signature")
add_global_variable = interface("numba.cuda.cgutils.add_global_variable")

GROUP_BYTES = 16
BLOCK = 256  # threads, at most
PLANES = 4  # numbers of a slot in shared memory
I16, I32, I64 = (ir.IntType(bits) for bits in (16, 32, 64))
FLOAT, DOUBLE, HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()
GLOBAL, SHARED = 1, 3  # address spaces
HALVES = {types.uint16: "f16x2", types.int16: "bf16x2"}  # what two of them are called


def arithmetic(storage: Any) -> Any:
    """The numba type that elements of memory are computed in."""
    return storage if isinstance(storage, types.Float) else types.float32


class Group(types.Type):  # type: ignore[misc]  # numba is untyped
    """The numba type of a group; `storage` is what memory holds."""

    def __init__(self, storage: Any) -> None:
        self.dtype = arithmetic(storage)
        self.lanes = GROUP_BYTES * 8 // storage.bitwidth
        self.ir = ir.VectorType(FLOAT if self.dtype.bitwidth == 32 else DOUBLE, self.lanes)
        super().__init__(name=f"Group({self.dtype} x {self.lanes})")


@register_model(Group)
class _GroupModel(PrimitiveModel):  # type: ignore[misc]  # numba is untyped
    def __init__(self, dmm: Any, fe_type: Group) -> None:
        super().__init__(dmm, fe_type, fe_type.ir)


class _Elementwise(AbstractTemplate):  # type: ignore[misc]  # numba is untyped
    def generic(self, args: tuple[Any, ...], kws: dict[str, Any]) -> Any:
        if len(args) == 2 and isinstance(args[0], Group) and args[0] == args[1]:
            return signature(args[0], *args)
        return None


def _register(op: Callable[[Any, Any], Any], instruction: str) -> None:
    typings.register_global(op)(type(f"_{instruction}", (_Elementwise,), {"key": op}))

    @lowerings.lower(op, Group, Group)  # type: ignore[untyped-decorator]  # numba is untyped
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


def place(builder: Any, base: Any, index: Any, element: Any, space: int) -> Any:
    """Address of base[index] in an address space."""
    pointer = builder.addrspacecast(base, ir.PointerType(element, space))
    return builder.gep(pointer, [index], source_etype=element)


def element_type(storage: Any) -> Any:
    """The LLVM type of an element in memory."""
    return {types.float32: FLOAT, types.float64: DOUBLE}.get(storage, I16)


def read(builder: Any, base: Any, index: Any, storage: Any, lanes: int) -> Any:
    """So many elements from base[index], in one instruction; a vector of what they are computed in."""
    kind = memory(storage, lanes)
    at = builder.bitcast(place(builder, base, index, element_type(storage), GLOBAL), ir.PointerType(kind, GLOBAL))
    loaded = builder.load(at, typ=kind)
    loaded.align = lanes * storage.bitwidth // 8
    return widen(builder, loaded, storage)


def write(builder: Any, base: Any, index: Any, storage: Any, vector: Any) -> None:
    """A vector to base[index] onwards, in one instruction."""
    narrowed = narrow(builder, vector, storage)
    at = builder.bitcast(
        place(builder, base, index, element_type(storage), GLOBAL), ir.PointerType(narrowed.type, GLOBAL)
    )
    builder.store(narrowed, at).align = vector.type.count * storage.bitwidth // 8


def memory(storage: Any, lanes: int) -> ir.VectorType:
    """The LLVM type of elements in memory: half precision in words of two.

    Of a vector of 16-bit elements libNVVM makes two loads of 8 bytes, and for targets below sm_100 it loads halves into
    float registers without converting them; words it does load at once and as they are.
    """
    if storage in HALVES and lanes > 1:
        return ir.VectorType(I32, lanes // 2)
    return ir.VectorType(element_type(storage), lanes)


def widen(builder: Any, vector: Any, storage: Any) -> Any:
    """Elements as loaded -> what they are computed in."""
    if storage not in HALVES:
        return vector
    values: list[Any] = []
    for k in range(vector.type.count):
        word = builder.extract_element(vector, ir.Constant(I32, k))
        if word.type == I16:
            word = builder.zext(word, I32)
        if storage == types.uint16:
            pair = builder.bitcast(word, ir.VectorType(HALF, 2))
            values += [builder.fpext(builder.extract_element(pair, ir.Constant(I32, j)), FLOAT) for j in range(2)]
        else:
            high = builder.and_(word, ir.Constant(I32, 0xFFFF0000))
            values += [builder.bitcast(bits, FLOAT) for bits in (builder.shl(word, ir.Constant(I32, 16)), high)]
    return packed(builder, values if vector.type.element == I32 else values[:1])


def narrow(builder: Any, vector: Any, storage: Any) -> Any:
    """The inverse, rounding to nearest even: two at a time, in an instruction that LLVM has no name for."""
    if storage not in HALVES:
        return vector
    values = [builder.extract_element(vector, ir.Constant(I32, k)) for k in range(vector.type.count)]
    asm = ir.InlineAsm(ir.FunctionType(I32, [FLOAT, FLOAT]), f"cvt.rn.{HALVES[storage]}.f32 $0, $1, $2;", "=r,f,f")
    words = [builder.call(asm, [high, low]) for low, high in zip(values[::2], values[1::2] or values, strict=True)]
    return packed(builder, words if len(values) > 1 else [builder.trunc(words[0], I16)])


def packed(builder: Any, values: list[Any]) -> Any:
    """The vector of these."""
    vector: Any = ir.Constant(ir.VectorType(values[0].type, len(values)), ir.Undefined)
    for k, value in enumerate(values):
        vector = builder.insert_element(vector, value, ir.Constant(I32, k))
    return vector


def lanes_of(x: Any) -> int:
    """Elements of a group of x."""
    return int(GROUP_BYTES * 8 // x.dtype.bitwidth)


def shared(builder: Any, place: tuple[str, Any, int], index: Any) -> Any:
    """Address of a number in this block's shared memory, an array of a name, type and size."""
    name, kind, count = place
    array = ir.ArrayType(kind, count)
    name = f"fastbn_{name}_{count}_{kind}"
    found = builder.module.globals.get(name) or add_global_variable(builder.module, array, name, addrspace=SHARED)
    # Each device function is a module of its own: with "internal" linkage what one puts is in another array than what
    # the next takes.
    found.linkage, found.initializer, found.align = "linkonce_odr", ir.Constant(array, ir.Undefined), GROUP_BYTES
    return builder.gep(found, [ir.Constant(I32, 0), index])


def few_of(x: Any) -> tuple[str, Any, int]:
    """The array with a slot for each thread."""
    return "few", Group(x.dtype).ir.element, PLANES * BLOCK


def many_of(x: Any) -> tuple[str, Any, int]:
    """The array with a slot for each lane of each thread."""
    return "many", Group(x.dtype).ir.element, PLANES * BLOCK * lanes_of(x)


def putting(array: Any) -> Any:
    """The code that keeps a number there."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], shared(builder, array, args[1]))
        return context.get_dummy_value()

    return codegen


def taking(array: Any) -> Any:
    """The code that reads one."""
    return lambda context, builder, sig, args: builder.load(shared(builder, array, args[1]), typ=array[1])
