"""The functions of `simd` on small NumPy arrays, for NUMBA_DISABLE_JIT=1.

Kernels as plain Python, every line counted and debuggable.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Index = tuple[int, ...]
_WIDE = 8


def _arithmetic(x: Array) -> np.dtype[Any]:
    return x.dtype if x.dtype.kind == "f" else np.dtype(np.float32)


def _widen(kept: Array) -> Array:
    """Elements as kept in an array -> what they are computed in."""
    if kept.dtype == np.uint16:
        wide: Array = kept.view(np.float16).astype(np.float32)
        return wide
    if kept.dtype == np.int16:
        bits: Array = kept.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return cast(Array, bits.view(np.float32))
    return cast(Array, kept.copy())


def _narrow(value: Array, dtype: np.dtype[Any]) -> Array:
    """The inverse, to nearest even."""
    if dtype == np.uint16:
        half: Array = value.astype(np.float16)
        return cast(Array, half.view(np.uint16))
    if dtype == np.int16:
        bits = value.astype(np.float32).view(np.uint32)
        high = bits >> np.uint32(16)
        rounded = (bits + (high & np.uint32(1)) + np.uint32(0x7FFF)) >> np.uint32(16)
        quiet = (high & np.uint32(0x8000)) | np.uint32(0x7FC0)
        return cast(Array, np.where(np.isnan(value), quiet, rounded).astype(np.uint16).view(np.int16))
    return value.astype(dtype)


def lanes(x: Array) -> int:
    """Elements of one vector of x."""
    return 64 // _arithmetic(x).itemsize


def bytes_of(x: Array) -> int:
    """Bytes of an element of x in memory."""
    return x.itemsize


def scalar(x: Array, value: float) -> Any:
    """A float64 rounded to what x is computed in."""
    return _arithmetic(x).type(value)


def _span(x: Array, index: Index, count: int) -> Array:
    assert min(index) >= 0, "a vector before the beginning"
    # rows without gaps: in one of the next
    if index[-1] >= x.shape[-1] and x.ndim == 2 and x.strides[0] == x.shape[1] * x.itemsize:
        index = (index[0] + index[1] // x.shape[1], index[1] % x.shape[1])
    where: Any = (*index[:-1], slice(index[-1], index[-1] + count))
    span: Array = x[where]
    assert span.size == count, "a vector beyond the end of its row"
    return span


def element(x: Array, index: Index) -> Any:
    """x[index] in float64."""
    return np.float64(_widen(_span(x, index, 1))[0])


def load(x: Array, index: Index) -> Array:
    """Vector at x[index]."""
    return _widen(_span(x, index, lanes(x)))


load_far = load


def load_some(x: Array, index: Index, count: int, fill: Array) -> Array:
    """The first `count` lanes from x[index], the others from `fill`."""
    vector: Array = fill.copy()
    vector[:count] = _widen(_span(x, index, count))
    return vector


def store(x: Array, index: Index, value: Array) -> None:
    """x[index] onwards = value."""
    _span(x, index, value.size)[:] = _narrow(value, x.dtype)


def store_stream(x: Array, index: Index, value: Array) -> None:
    """The same; checks the alignment that the real one needs."""
    assert address(x, index) % (value.size * x.itemsize) == 0, "a streaming store off its boundary"
    store(x, index, value)


def store_some(x: Array, index: Index, count: int, value: Array) -> None:
    """The first `count` lanes of value to x[index]."""
    _span(x, index, count)[:] = _narrow(value[:count], x.dtype)


def broadcast(x: Array, value: float) -> Array:
    """The value in every lane of a vector of x."""
    return np.full(lanes(x), value, _arithmetic(x))


def load_broadcast(x: Array, index: Index) -> Array:
    """The element x[index] of a float array in every lane."""
    return broadcast(x, x[index])


def splice(a: Array, count: int, b: Array) -> Array:
    """The first `count` lanes of a, the others of b."""
    return np.concatenate([a[:count], b[count:]])


def muladd(a: Array, b: Array, c: Array) -> Array:
    """The vector a * b + c."""
    result: Array = a * b + c
    return result


def quiet(a: Array) -> Array:
    """The vector with one NaN for all."""
    return np.where(np.isnan(a), a.dtype.type(np.nan), a)


def total(a: Array) -> Any:
    """Sum of the lanes."""
    return a.sum()


def load_wide(x: Array, index: Index, count: int) -> Array:
    """The first `count` of eight elements from x[index], as a wide vector with zeros behind them."""
    vector = np.zeros(_WIDE)
    vector[:count] = _widen(_span(x, index, count))
    return vector


def store_wide(x: Array, index: Index, count: int, value: Array) -> None:
    """The first `count` lanes of a wide vector to x[index] onwards, rounded to the dtype of a float array x."""
    _span(x, index, count)[:] = value[:count]


def rounded(x: Array, value: Array) -> Array:
    """A wide vector rounded to what x is computed in, as a wide vector."""
    return value.astype(_arithmetic(x)).astype(np.float64)


def wide(value: float) -> Array:
    """The float64 in every lane of a wide vector."""
    return np.full(_WIDE, value)


def root(a: Array) -> Array:
    """Square root of each lane."""
    result: Array = np.sqrt(a)
    return result


def rough_root(a: Array) -> Array:
    """The same within 7 %, by halving the exponent."""
    word, one = (np.uint32, 0x3F800000) if a.dtype == np.float32 else (np.uint64, 0x3FF0000000000000)
    bits: Array = (a.view(word) >> word(1)) + word(one // 2)
    return cast(Array, bits.view(a.dtype))


def not_negative(a: Array) -> Array:
    """Each lane, 0 where it is below; NaN stays NaN."""
    return np.where(a < 0.0, 0.0, a)


def within(a: Array, count: int, low: float, high: float) -> bool:
    """Whether low < lane < high for the first `count` lanes of a wide vector."""
    return bool(((a[:count] > low) & (a[:count] < high)).all())


def choose(a: Array, low: float, high: float, inside: Array, outside: Array) -> Array:
    """Each lane of `inside` where low < a < high, else of `outside`; all wide vectors."""
    return np.where((a > low) & (a < high), inside, outside)


def at(like: Array, address: int, shape: Index) -> Array:
    """The array of elements of `like` at an address, without gaps."""
    size = math.prod(shape)
    memory: Any = (ctypes.c_char * (size * like.itemsize)).from_address(address) if size else b""
    array: Array = np.ndarray(shape, like.dtype, memory)
    return array


def address(x: Array, index: Index) -> int:
    """Address of x[index], in bytes."""
    return int(x.ctypes.data + sum(i * stride for i, stride in zip(index, x.strides, strict=True)))


def prefetch(x: Array, index: Index) -> None:
    """Nothing to hurry here."""


def fence() -> None:
    """Nothing to order here."""
