"""Any checked array and channel axis -> a canonical view.

Canonical views are (N, C, S) with S contiguous ("channels first") or (R, C) with C contiguous ("channels last"). Batch
normalization does not care in which order a channel's values come, so the other axes are ordered by their strides: C
and Fortran order, transposed and strided arrays become canonical without a copy wherever two strides describe them; the
rest is copied, once, here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastbn.arguments import checks

Array = NDArray[Any]
Kind = Literal["channels_first", "channels_last"]

ALIGNMENT = 64
ALIGNED_BYTES = 64 * 1024  # from here on the alignment gains more than the 2 us that it costs


class Plan:
    """How arrays of one shape and memory order become canonical.

    `kind` tells which kernels run, `dims` is (N, C, S) or (R, C), `order` the transposition before the reshape to
    `dims` (None where the plain reshape does), `count` the values per channel of `channels`, `memory` the axes of a
    result from the outermost in memory.
    """

    __slots__ = (
        "_as_is",
        "_back",
        "_compact",
        "_size",
        "axis",
        "channels",
        "count",
        "dims",
        "kind",
        "memory",
        "order",
        "shape",
    )

    def __init__(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        axis: int,
        outer: Sequence[int],
        inner: Sequence[int],
        last: bool,
    ) -> None:
        self.shape = shape
        self.axis, self.channels = axis, shape[axis]
        n, s = (math.prod(shape[a] for a in axes) for axes in (outer, inner))
        self.kind: Kind = "channels_last" if last else "channels_first"
        self.dims = (n, self.channels) if last else (n, self.channels, s)
        self.count = n * s
        self._size = self.count * self.channels
        ones = [a for a in range(len(shape)) if shape[a] == 1 and a != axis]
        order = (*ones, *outer, axis, *inner)
        significant = [a for a in order if shape[a] != 1]
        self.order = None if significant == sorted(significant) else order
        self._as_is = self.order is None and self.dims == shape
        # Memory order of a result: as the planned array has it, also where its channels are the outermost axis.
        outermost = not last and all(abs(strides[axis]) > abs(strides[a]) for a in outer)
        own = (*ones, axis, *outer, *inner) if outermost else order
        self.memory = own
        self._compact = tuple(shape[a] for a in own)
        self._back = None if own == tuple(range(len(shape))) else tuple(own.index(a) for a in range(len(own)))

    def view(self, array: Array) -> Array | None:
        """The canonical view of an array of this plan's shape, or None where that would take a copy."""
        if self.order is None and array.flags.c_contiguous:
            return array if self._as_is else array.reshape(self.dims)
        moved = array if self.order is None else array.transpose(self.order)
        view = moved.reshape(self.dims)
        if view.size == 0:
            return view
        if self.dims[-1] == 1:  # rows of one value would waste a vector each
            return view if self.count == 1 else None
        return view if view.strides[-1] == array.itemsize and np.may_share_memory(view, array) else None

    def empty(self, dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """Fresh memory in this memory order.

        (array of `shape`, its canonical view), on a 64-byte boundary where it is large.
        """
        size = self._size * dtype.itemsize
        if size < ALIGNED_BYTES:
            whole = np.empty(self._compact, dtype)
            if self._as_is and self._back is None:
                return whole, whole
        else:  # np.empty aligns to 16 bytes, streaming stores want 64
            raw = np.empty(size + ALIGNMENT, np.uint8)
            start = -raw.ctypes.data % ALIGNMENT
            whole = raw[start : start + size].view(dtype).reshape(self._compact)
        if self._back is not None:
            whole = whole.transpose(self._back)
        return whole, cast(Array, self.view(whole))  # a compact array in this order always has one

    def restore(self, canonical: Array) -> Array:
        """The inverse of `view`: a canonical array in this plan's shape."""
        if self.order is None:
            return canonical.reshape(self.shape)
        moved: Array = canonical.reshape([self.shape[a] for a in self.order]).transpose(np.argsort(self.order))
        return moved


@lru_cache(maxsize=4096)
def compact(shape: tuple[int, ...], itemsize: int = 1) -> tuple[int, ...]:
    """Strides of a C-contiguous array, as NumPy gives them; in elements for an itemsize of 1."""
    return tuple(itemsize * math.prod(shape[a + 1 :]) for a in range(len(shape)))


def planned(shape: tuple[int, ...], strides: tuple[int, ...], axis: int, itemsize: int) -> Plan:
    """The plan of an array; TypeError or ValueError where there is none, as `checks.check_axis` says."""
    axis = checks.check_axis(shape, axis)
    others = [a for a in range(len(shape)) if a != axis and shape[a] != 1]
    others.sort(key=lambda a: -abs(strides[a]))
    if shape[axis] > 1 and strides[axis] == itemsize and not any(strides[a] == itemsize for a in others):
        return Plan(shape, strides, axis, others, (), last=True)
    inner: list[int] = []
    step = itemsize
    while others and strides[others[-1]] == step:
        inner.insert(0, others.pop())
        step *= shape[inner[0]]
    return Plan(shape, strides, axis, others, inner, last=False)


def view_of(plan: Plan, x: Array) -> tuple[Plan, Array]:
    """The canonical view of the array that was planned.

    Of a compact copy, and its plan, where two strides can't describe it.
    """
    if x.dtype.isnative and (view := plan.view(x)) is not None:
        return plan, view
    compact = np.empty_like(x, dtype=x.dtype.newbyteorder("="), subok=False)
    compact[...] = x
    plan = planned(compact.shape, compact.strides, plan.axis, compact.itemsize)
    view = plan.view(compact)
    assert view is not None  # a compact array always has one
    return plan, view


def plan_for(shape: tuple[int, ...], dtype: DTypeLike, axis: int, channels_last: bool = False) -> Plan:
    """The plan of a compact array that need not exist: C order, or channels innermost in memory."""
    dtype = np.dtype(dtype)
    axes = [a for a in range(len(shape)) if a != axis] + [axis] if channels_last else list(range(len(shape)))
    strides = [
        dtype.itemsize * math.prod(max(shape[b], 1) for b in axes[axes.index(a) + 1 :]) for a in range(len(shape))
    ]
    return planned(shape, tuple(strides), axis, dtype.itemsize)


def view_as(plan: Plan, array: Array) -> Array:
    """The canonical view of a checked input that goes beside the planned one; copied where its memory order differs."""
    view = plan.view(array) if array.dtype.isnative else None
    if view is None:
        whole, view = plan.empty(array.dtype.newbyteorder("="))
        whole[...] = array
    return view
