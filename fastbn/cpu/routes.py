"""How the CPU kernels walk arrays of one shape, dtype and memory order.

On rows or columns, in one kernel or two, on how many tasks.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn.arguments import config
from fastbn.cpu import schedule, threads

Array = NDArray[Any]
Ints = tuple[int, ...]

# Half precision reaches the kernels as its bits, in the integer type that tells them which one it is.
BITS: dict[str, np.dtype[Any]] = {"float16": np.dtype(np.uint16), "bfloat16": np.dtype(np.int16)}
SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
NONE = {kind: np.empty(0, kind) for kind in (SINGLE, DOUBLE)}  # an absent parameter is an empty array to the kernels


class Route(NamedTuple):
    """How arrays of one shape, dtype and memory order are walked together."""

    bits: np.dtype[Any] | None  # what half precision is seen as
    stored: np.dtype[Any]  # what the kernels see
    kind: np.dtype[Any]  # what they compute in
    seen: Ints  # and in which shape: columns as (R, C * S)
    values: int  # per channel
    share: int  # columns of a channel, S; 0 for the kernels on rows
    first: schedule.First | None
    last: schedule.Last | None
    none: Array

    def see(self, array: Array) -> Array:
        """An array as the kernels see it."""
        if self.bits is not None:
            array = array.view(self.bits)
        return array if array.shape == self.seen else array.reshape(self.seen)


@lru_cache(maxsize=4096)
def of(shape: Ints, dtype: np.dtype[Any], *strides: Ints, applied: bool = False) -> Route:
    """On columns where the kernels for that serve every array.

    Channels last, or short rows without gaps between them.
    """
    bits = None if dtype in NONE else BITS[dtype.name]
    kind = DOUBLE if dtype.itemsize == 8 else SINGLE
    if len(shape) == 2:
        contiguous = all(s[0] == shape[1] * dtype.itemsize for s in strides)
        last = schedule.last(*shape, 1, kind.itemsize, contiguous, applied)
        return Route(bits, bits or dtype, kind, shape, shape[0], 1, None, last, NONE[kind])
    N, C, S = shape
    if schedule.short(N, S, kind.itemsize, applied) and (C == 1 or all(s[1] == S * dtype.itemsize for s in strides)):
        contiguous = all(s[0] == C * S * dtype.itemsize for s in strides)
        last = schedule.last(N, C, S, kind.itemsize, contiguous, applied)
        return Route(bits, bits or dtype, kind, (N, C * S), N * S, S, None, last, NONE[kind])
    return Route(bits, bits or dtype, kind, shape, N * S, 0, schedule.first(N, C, S, kind.itemsize), None, NONE[kind])


@lru_cache(maxsize=4096)
def fused(shape: Ints, dtype: np.dtype[Any], out: Ints, *strides: Ints) -> Route | None:
    """The route of a call in one kernel, where a task's share stays in the cache between its two passes.

    Not where the last-level cache holds all arrays and they are not small: there two kernels in the order of memory are
    faster. The inputs alone decide how statistics are taken, so that they do not depend on where the result goes.
    """
    route = of(shape, dtype, *strides)
    if route.first is not None:
        held = schedule.SWEEP_BYTES <= (1 + len(strides)) * math.prod(shape) * dtype.itemsize < config.STREAM_BYTES
        return None if held or route.first.parts > 1 else route
    fits = route.last is not None and route.last.parts == 1 and route.last.fold == 1
    return route if fits and of(shape, dtype, out).last is not None else None


def streams(nbytes: int, arrays: int) -> bool:
    """Whether a result is written past the cache, in a call on so many arrays of its size."""
    return arrays * nbytes >= config.STREAM_BYTES


def tasks(units: int, parallel: bool) -> int:
    """How many tasks share so many units of work: a few for each thread."""
    return min(units, 4 * threads.get_num_threads()) if parallel else 1


def lot(plan: schedule.First, C: int) -> int:
    """Channels that statistics alone take together: as many as leave work for every task.

    One where its rows are long.
    """
    if plan.splits > 1:
        return 1
    return max(1, C * plan.parts // (4 * threads.get_num_threads())) if plan.parallel else C


def folded(cut: schedule.Last, array: Array) -> tuple[Array, Array]:
    """(rows folded, the rows left over as one row) of an (R, F) array."""
    if cut.fold == 1:
        return array, array
    whole = array.shape[0] - cut.rest
    return array[:whole].reshape(-1, cut.fold * array.shape[1]), array[whole:].reshape(1, -1)
