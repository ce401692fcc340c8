"""Which dtypes x may have, and which dtype its parameters then have.

bfloat16 is the one of `ml_dtypes`. Arrays of it are recognised by name: whoever holds one has the package, and fastbn
need not import it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fastbn.arguments.errors import MissingExtra

Dtype = np.dtype[Any]

FLOAT32: Dtype = np.dtype(np.float32)
FLOAT64: Dtype = np.dtype(np.float64)
WANTED = "float16, bfloat16, float32 or float64"

# What kernels see half precision as: its bits, in the integer dtype that tells them which of the two it is.
HALF_STORAGE: dict[str, Dtype] = {"float16": np.dtype(np.uint16), "bfloat16": np.dtype(np.int16)}

# Of x, in native byte order; looked up at every call. bfloat16 joins when `supported` first meets it.
NATIVE: set[Dtype] = {np.dtype(np.float16), FLOAT32, FLOAT64}


def supported(dtype: Dtype) -> bool:
    """Whether x may be of this dtype, in either byte order."""
    native = dtype.newbyteorder("=")
    if native.name == "bfloat16" and native.itemsize == 2:
        NATIVE.add(native)
    return native in NATIVE


def small(dtype: Dtype) -> bool:
    """Whether it is an integer of 8 or 16 bits, in either byte order: statistics are taken of these too."""
    return dtype.kind in "iu" and dtype.itemsize <= 2


def of_parameters(dtype: Dtype) -> Dtype:
    """The dtype of gamma, beta, their gradients and the running statistics beside x of a supported dtype.

    Never a half one.
    """
    return FLOAT64 if dtype.itemsize == 8 else FLOAT32


def bfloat16() -> Dtype:
    """The dtype; MissingExtra where `ml_dtypes` is not installed."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise MissingExtra("bfloat16 needs ml_dtypes: pip install 'fastbn[bfloat16]'") from error
    found: Dtype = np.dtype(ml_dtypes.bfloat16)
    return found


def find(dtype: DTypeLike) -> Dtype | None:
    """The dtype that NumPy makes of it, or None; not float64 of None, nor the dtype of a number."""
    try:
        return None if dtype is None or isinstance(dtype, np.generic) else np.dtype(dtype)
    except Exception:  # TypeError, or what the words of a dtype led to
        return None
