"""The one table of shapes, for the asv suite and for `python -m bench.peers`, and arrays of any shape."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# bytes: PyTorch's own tensors start on a cache line, so nobody is slowed down by where NumPy's happen to start
ALIGNMENT = 64

IMAGES: tuple[tuple[int, ...], ...] = (  # each channels first and channels last in memory
    (32, 64, 112, 112),  # the first layer of a ResNet
    (32, 256, 56, 56),
    (32, 64, 56, 56),
    (32, 512, 28, 28),
    (32, 1024, 14, 14),
    (32, 256, 14, 14),
    (32, 2048, 7, 7),  # its last: short rows
    (32, 512, 7, 7),
    (96, 192, 17, 17),  # odd images
    (64, 128, 29, 29),
    (32, 32, 112, 112),
    (32, 1024, 7, 7),
    (1, 32, 114, 130),  # one image: segmentation
    (1, 256, 24, 26),
    (4, 8, 640, 1024),  # few channels with a large slab each
    (1, 3, 1024, 1024),
    (8, 256, 1120),  # sound
)
FLAT: tuple[tuple[int, ...], ...] = (
    (4096, 256),
    (65536, 64),  # features of a table or of points
    (128, 2048),  # fully connected layers
    (128, 8192),
    (200_000, 4),  # few channels, many rows
    (131_071, 1),
)
# where a call is mostly overhead
SMALL_SHAPES: tuple[tuple[int, ...], ...] = ((32, 64), (16, 256), (2, 16, 8, 8), (1, 64, 7, 7))


class Case(NamedTuple):
    """A shape with its channel axis 1."""

    shape: tuple[int, ...]
    group: str  # one of GROUPS, in the table
    last: bool = False  # the channels are innermost in memory, in a transposed view

    @property
    def memory(self) -> tuple[int, ...]:
        """The axes from outermost to innermost in memory."""
        axes = tuple(range(len(self.shape)))
        return (0, *axes[2:], 1) if self.last else axes


def name_of(shape: tuple[int, ...]) -> str:
    """A shape's name in the table."""
    return "x".join(map(str, shape))


CASES = {
    **{name_of(shape): Case(shape, "first") for shape in IMAGES},
    **{f"{name_of(shape)} last": Case(shape, "last", True) for shape in IMAGES},
    **{name_of(shape): Case(shape, "flat") for shape in FLAT},
    **{name_of(shape): Case(shape, "small") for shape in SMALL_SHAPES},
}
GROUPS = ("first", "last", "flat", "small")
DTYPES = ("float32", "float64", "float16", "bfloat16")


def names(*groups: str) -> list[str]:
    """The cases of some groups, in the table's order."""
    return [name for name, case in CASES.items() if case.group in groups]


def dtype_of(name: str) -> np.dtype[Any]:
    """NumPy's dtype of a name; bfloat16 is there once ml_dtypes is imported."""
    if name == "bfloat16":
        importlib.import_module("ml_dtypes")
    return np.dtype(name)


def aligned(size: int) -> NDArray[np.uint8]:
    """So many bytes that begin on a cache line."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


def empty(case: Case, dtype: str) -> Array:
    """An array of a case's shape and memory order that begins on a cache line."""
    stored = dtype_of(dtype)
    flat = aligned(math.prod(case.shape) * stored.itemsize).view(stored)
    made: Array = flat.reshape([case.shape[axis] for axis in case.memory]).transpose(np.argsort(case.memory))
    return made


def array(case: Case, dtype: str, seed: int = 0) -> Array:
    """Normal data of a case, mean 3 and standard deviation 2; the same values in either memory order."""
    made = empty(case, dtype)
    values = np.random.default_rng(seed).standard_normal(made.shape, np.float64 if dtype == "float64" else np.float32)
    values *= 2
    values += 3
    made[...] = values
    return made


def parameters(case: Case, dtype: str) -> tuple[Array, Array]:
    """(gamma, beta) of a case's channels: float32, or float64 beside float64 data."""
    parameter = np.float64 if dtype == "float64" else np.float32
    rng = np.random.default_rng(7)
    channels = case.shape[1]
    return rng.uniform(0.5, 2.0, channels).astype(parameter), rng.standard_normal(channels).astype(parameter)


def check(actual: Array, expected: Array, limit: float) -> None:
    """Raise where a result is not what it should be: a wrong kernel has no speed."""
    wide, exact = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    apart = float(np.max(np.abs(wide.reshape(exact.shape) - exact) / np.maximum(1.0, np.abs(exact))))
    if not apart <= limit:
        raise AssertionError(f"off by {apart:.1e}, want at most {limit:.1e}")
