"""Whether arrays, or the elements of one, share memory."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def repeats(array: Array) -> bool:
    """Whether elements may share memory: an axis that steps by less than the axes within it reach."""
    reach = array.itemsize
    for stride, n in sorted((abs(stride), n) for stride, n in zip(array.strides, array.shape, strict=True)):
        if n > 1 and stride < reach:
            return array.size > 0
        reach += stride * (n - 1)
    return False


def same_memory(a: Any, b: Array) -> bool:
    """Whether two arrays are element for element the same memory."""
    # the last in a tenth of the time of the rest
    if a is b or not isinstance(a, np.ndarray) or (a.flags.owndata and b.flags.owndata):
        return a is b
    return a.shape == b.shape and a.ctypes.data == b.ctypes.data and _steps(a) == _steps(b)


def _steps(array: Array) -> list[int]:
    """The strides that lead anywhere: those of axes of length 1 may be any."""
    return [stride for stride, n in zip(array.strides, array.shape, strict=True) if n != 1]


def shared(a: Array, b: Array) -> bool:
    """Whether two arrays have memory in common."""
    return bool(np.may_share_memory(a, b)) and _overlap(a, b)


def _overlap(a: Array, b: Array) -> bool:
    try:
        return bool(np.shares_memory(a, b, max_work=cast(Any, 100_000)))
    except np.exceptions.TooHardError:
        return True  # can't be told in reasonable time: refuse rather than corrupt
