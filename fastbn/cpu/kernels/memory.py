"""Memory itself: addresses and the arrays on them, what is fetched ahead, and when streaming stores arrive."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from fastbn.cpu.kernels.jit import DISABLED, leaf
from fastbn.cpu.kernels.vector import I32, I64, call, pointer


@intrinsic
def _pointer(typingctx, like, address):
    """An address as a pointer to elements of `like`."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[1], context.get_value_type(sig.return_type))

    return types.CPointer(like.dtype)(like, address), codegen


def _described(like: Any, address: int, shape: tuple[int, ...]) -> Any:
    """`at` in plain Python."""
    size = math.prod(shape)
    memory = (ctypes.c_char * (size * like.itemsize)).from_address(address) if size else b""
    return np.ndarray(shape, like.dtype, memory)


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
    at = _described
