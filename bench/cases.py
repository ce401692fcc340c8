"""Shapes that stand for real layers, and arrays of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Case(NamedTuple):
    """A shape with its channel axis 1; `last` for channels innermost in memory."""

    shape: tuple[int, ...]
    last: bool = False


CASES = {
    "32x64x56x56": Case((32, 64, 56, 56)),  # an early ResNet-50 layer
    "32x64x56x56 last": Case((32, 64, 56, 56), last=True),
    "32x512x7x7": Case((32, 512, 7, 7)),  # short rows
    "32x2048x7x7 last": Case((32, 2048, 7, 7), last=True),
    "1x32x114x130": Case((1, 32, 114, 130)),  # one image: segmentation
    "65536x64": Case((65536, 64)),  # features of a table or of points
    "200000x4": Case((200_000, 4)),  # few channels, many rows
    "128x2048": Case((128, 2048)),  # a fully connected layer
}
SMALL = {
    "32x64": Case((32, 64)),
    "16x256": Case((16, 256)),
    "2x16x8x8": Case((2, 16, 8, 8)),
    "1x64x7x7": Case((1, 64, 7, 7)),
}


def array(name: str, dtype: str, seed: int = 0) -> Array:
    """Normal data of a case, mean 3 and standard deviation 2, in its memory order."""
    case = (CASES | SMALL)[name]
    values = np.random.default_rng(seed).normal(3.0, 2.0, case.shape).astype(dtype)
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(values, 1, -1)), -1, 1) if case.last else values


def check(found: Array, expected: Array, limit: float) -> None:
    """Raise where a result is not what it should be: a wrong kernel has no speed."""
    error = float(np.max(np.abs(np.asarray(found, np.float64) - expected)))
    if not error <= limit:
        raise AssertionError(f"off by {error:.1e}, want at most {limit:.1e}")
