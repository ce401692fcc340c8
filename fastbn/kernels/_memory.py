"""Arrays on memory that is known by its address: for callers whose arrays NumPy would first have to describe."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from fastbn.kernels._jit import DISABLED, leaf


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


if DISABLED:
    at = _described
