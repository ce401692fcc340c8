"""The vectors of `_simd` as small NumPy arrays, for NUMBA_DISABLE_JIT=1: kernels as plain Python, every line counted and debuggable."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Index = tuple[int, ...]


def lanes(x: Array) -> int:
    """Elements of one vector of x's dtype."""
    return 64 // x.itemsize


def _span(x: Array, index: Index, count: int) -> Array:
    where: Any = (*index[:-1], slice(index[-1], index[-1] + count))
    span: Array = x[where]
    assert span.size == count, "a vector beyond the end of its row"
    return span


def load(x: Array, index: Index) -> Array:
    """Vector at x[index]."""
    vector: Array = _span(x, index, lanes(x)).copy()
    return vector


def load_some(x: Array, index: Index, count: int, fill: Array) -> Array:
    """The first `count` lanes from x[index], the others from `fill`."""
    vector: Array = fill.copy()
    vector[:count] = _span(x, index, count)
    return vector


def store(x: Array, index: Index, value: Array) -> None:
    """x[index] onwards = value."""
    _span(x, index, value.size)[:] = value


def store_stream(x: Array, index: Index, value: Array) -> None:
    """The same; checks the alignment that the real one needs."""
    assert address(x, index) % 64 == 0, "a streaming store off its 64-byte boundary"
    store(x, index, value)


def store_some(x: Array, index: Index, count: int, value: Array) -> None:
    """The first `count` lanes of value to x[index]."""
    _span(x, index, count)[:] = value[:count]


def spread(x: Array, value: float) -> Array:
    """The value in every lane of a vector of x's dtype."""
    return np.full(lanes(x), value, x.dtype)


def broadcast(x: Array, index: Index) -> Array:
    """The element x[index] in every lane."""
    return spread(x, x[index])


def muladd(a: Array, b: Array, c: Array) -> Array:
    """The vector a * b + c."""
    result: Array = a * b + c
    return result


def total(a: Array) -> Any:
    """Sum of the lanes."""
    return a.sum()


def wide_sums(a: Array, shift: Array) -> tuple[float, float]:
    """(sum, sum of squares) of a - shift over the lanes, all in float64."""
    d = a.astype(np.float64) - shift
    return d.sum(), (d * d).sum()


def load_wide(x: Array, index: Index) -> Array:
    """Eight elements from x[index], as a vector of float64."""
    return _span(x, index, 8).astype(np.float64)


def store_narrow(x: Array, index: Index, value: Array) -> None:
    """Eight elements from x[index] onwards = a vector of float64, rounded to the dtype of x."""
    _span(x, index, 8)[:] = value


def address(x: Array, index: Index) -> int:
    """Address of x[index], in bytes."""
    return int(x.ctypes.data + sum(i * stride for i, stride in zip(index, x.strides, strict=True)))


def fence() -> None:
    """Nothing to order here."""
