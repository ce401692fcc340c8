"""Arrays on the machine, as `__cuda_array_interface__` has them, in every layout, whose elements alone may be
touched.
"""

import math
from typing import Any

import numpy as np

from .arithmetic import to_bfloat16
from .memory import GRANULE, Fault, Memory

ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
TYPESTR = {"float32": "<f4", "float64": "<f8", "float16": "<f2", "bfloat16": "<V2"}
HOST: dict[str, Any] = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": np.uint16}
LAYOUTS = ("first", "last", "crop", "strided", "reversed", "fortran", "channel outermost")
BOUNDARY = 256  # bytes, of every allocation

Ints = tuple[int, ...]


class Array:
    """Elements of an allocation."""

    def __init__(
        self, memory: Memory, offset: int, shape: Ints, strides: Ints, dtype: str, readonly: bool = False
    ) -> None:
        self.memory, self.offset, self.shape, self.strides, self.dtype = memory, offset, shape, strides, dtype
        self.readonly, self.ndim, self.size = readonly, len(shape), math.prod(shape)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        address = self.memory.base + self.offset if self.size else 0
        return {
            "shape": self.shape,
            "strides": self.strides,
            "typestr": TYPESTR[self.dtype],
            "data": (address, self.readonly),
            "version": 3,
            "stream": None,
        }

    def __getitem__(self, k: int) -> "Array":
        return Array(
            self.memory, self.offset + k * self.strides[0], self.shape[1:], self.strides[1:], self.dtype, self.readonly
        )

    @property
    def granules(self) -> np.ndarray:
        """Those of each element."""
        at = np.full(self.shape, self.offset, np.int64)
        for axis, (n, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            at += (np.arange(n) * stride).reshape([-1 if a == axis else 1 for a in range(self.ndim)])
        return at[..., None] // GRANULE + np.arange(ITEMSIZE[self.dtype] // GRANULE)

    def _content(self) -> np.ndarray:
        return np.ndarray(self.shape, HOST[self.dtype], self.memory.content, self.offset, self.strides)

    def allow(self, allowed: int) -> "Array":
        """Let kernels read and write the elements, or one of both."""
        self.memory.allowed[self.granules] = allowed
        self.readonly = not allowed & 2
        return self

    def put(self, values: np.ndarray) -> None:
        """Set the elements, rounded to the dtype."""
        self._content()[...] = (
            to_bfloat16(values.astype(np.float32)) if self.dtype == "bfloat16" else values.astype(HOST[self.dtype])
        )
        self.memory.defined[self.granules] = True

    def get(self) -> np.ndarray:
        """The elements in float64.

        Raises
        ------
        Fault
            Some were never written.
        """
        missing = ~self.memory.defined[self.granules].all(-1)
        if missing.any():
            raise Fault(
                f"{self.memory.name}: {missing.sum()} of {missing.size} elements are undefined, first "
                f"{np.argwhere(missing)[0]}"
            )
        found = self._content().copy()
        return (
            (found.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
            if self.dtype == "bfloat16"
            else found.astype(np.float64)
        )


def _steps(sizes: Ints, order: list[int], itemsize: int) -> tuple[list[int], int]:
    """Strides for axes from the outermost in memory, and the bytes of all."""
    steps, step = [0] * len(sizes), itemsize
    for axis in reversed(order):
        steps[axis], step = step, step * sizes[axis]
    return steps, step


def laid(shape: Ints, layout: str, itemsize: int, shift: int) -> tuple[int, int, Ints]:
    """(bytes, offset of the first element, strides) of an array in a layout, `shift` elements behind a boundary."""
    order = list(range(len(shape)))
    order = {"last": [0, *order[2:], 1], "fortran": order[::-1], "channel outermost": [1, 0, *order[2:]]}.get(
        layout, order
    )
    sizes = {"crop": tuple(n + 3 for n in shape), "strided": (*shape[:-1], 2 * shape[-1])}.get(layout, shape)
    steps, size = _steps(sizes, order, itemsize)
    offset = shift * itemsize
    size += offset
    if layout == "crop":  # one element in from every edge
        offset += sum(steps)
    elif layout == "strided":
        steps[-1] *= 2
    elif layout == "reversed":
        offset += (shape[0] - 1) * steps[0]
        steps[0] = -steps[0]
    return size, offset, tuple(steps)
