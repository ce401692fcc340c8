"""How an array is cut into blocks, parts and units.

Pure functions of the shape, so that any number of threads gives the same bits.
Sizes that decide the arithmetic are of the arithmetic's elements (`itemsize`: 4 for half precision too): a
half-precision array is cut as its float32 copy would be.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn.arguments import config, dtypes
from fastbn.cpu import threads
from fastbn.cpu.kernels.welford import BLOCK, LINEAR, PANELS, WORK, cut

Array = NDArray[Any]
Ints = tuple[int, ...]

SLAB_BYTES = 4 * 2**20  # channels first: what a task may hold in its cache between two passes
# Channels first: what the fused kernels take together, up to 8 channels. Coefficients are computed for 8 at once, which
# shows where slabs are small; statistics then go along the memory, which forward gains from up to twice a core's own
# cache (32 x 512 x 28 x 28: 1.2 to 1.6 times as fast, 32 x 256 x 28 x 28: 1.2 to 1.4), and backward, which reads two
# arrays, does not (32 x 256 x 28 x 28: 0.85).
GROUP_BYTES, BACK_BYTES = 2 * 2**20, 64 * 1024
# channels first: arrays that together fill the last-level cache well, and are still found there when read again
SWEEP_BYTES = 24 * 2**20
ALONG_BYTES = 32 * 2**20  # columns: what a last-level cache does not hold
BLOCK_BYTES = 512 * 1024  # columns: the same, in pieces of rows that are far apart
PART_BYTES = 256 * 1024  # a task worth scheduling
COLUMNS = 1024  # of a unit: coefficients and sums of so many fit the first-level cache
FOLDED = 128  # columns that rows are folded to
NARROW = 256  # columns: in shorter runs, memory waits for the prefetcher more than it moves data

SHORT_BYTES = 2048  # rows of channels first up to this are treated as columns
# And in passes over elements alone, where columns are runs of 4 KB from as many pages as there are rows: those of a
# vector and more go in the order of memory (normalized in a network, 32 x 576 x 8 x 8: 850 -> 260 us in one process,
# 430 -> 260 in another; 12.8 MB in rows of 196 bytes: 1110 -> 760).
SHORT_APPLIED = 63
PARTS = 64  # enough tasks for the cores of any machine that numba drives well
TASKS = 16


class Rows(NamedTuple):
    """Schedule of an (N, C, S) array: see `fastbn.cpu.kernels.rows`."""

    block_rows: int  # of a block, where a block is whole rows
    splits: int  # blocks of a row, where a row is several
    blocks: int  # of a channel
    parts: int  # of a channel; 1 where a channel stays in the cache: the fused kernels
    pieces: int  # of a row, in the elementwise passes
    group: int  # channels that the forward takes together
    prefetch: int  # channels further, whose slabs are fetched meanwhile; 0 where the cache has no room for them
    back_group: int  # the same of the backward
    back_prefetch: int
    parallel: bool


class Columns(NamedTuple):
    """Schedule of an (R, C * S) array: see `fastbn.cpu.kernels.columns`."""

    fold: int  # rows of the array in a row of the kernel
    rest: int  # rows left over
    parts: int  # of the rows; 1 where a block stays in the cache: the fused kernels
    block: int  # channels of a unit
    blocks: int
    pad: int  # columns of a workspace: a unit's in whole vectors, and one more
    work: int  # elements of a task's workspace
    runs: int  # of the rows, in the elementwise passes
    along: bool  # whether moments go row by row
    back_along: bool  # and sums of the backward
    parallel: bool


def of_rows(N: int, C: int, S: int, itemsize: int) -> Rows:
    """The schedule of (N, C, S)."""
    slab = N * S * itemsize
    vectors = -(-S * itemsize // 64)  # of a row
    rows, splits, blocks = cut(N, S, 64 // itemsize, BLOCK)
    parallel = slab * C >= config.SERIAL_BYTES
    fused = not parallel or (slab <= SLAB_BYTES and (C >= TASKS or slab <= PART_BYTES))
    parts = 1 if fused else min(PARTS, blocks, max(1, slab // PART_BYTES))
    pieces = min(max(1, vectors // 64), -(-PARTS // (N * C)))
    most = max(1, min(8, C // TASKS if parallel else C))
    group, back_group = (max(1, min(most, limit // slab)) for limit in (GROUP_BYTES, BACK_BYTES))
    prefetch, back_prefetch = (n if n * slab <= BLOCK_BYTES else 0 for n in (group, back_group))
    return Rows(rows, splits, blocks, parts, pieces, group, prefetch, back_group, back_prefetch, parallel)


def short(N: int, S: int, itemsize: int, applied: bool = False) -> bool:
    """Whether rows of channels first are better treated as columns; `applied`: in a pass over elements alone."""
    return S * itemsize <= (SHORT_BYTES // 16 if N < 4 else SHORT_APPLIED if applied else SHORT_BYTES)


def of_columns(R: int, C: int, S: int, itemsize: int, contiguous: bool, applied: bool = False) -> Columns:
    """The schedule of (R, C * S); only rows without gaps can be folded. `applied`: of a pass over elements alone."""
    lanes = 64 // itemsize
    size = R * C * S * itemsize
    fold = 1
    while contiguous and fold * 2 * C * S <= FOLDED and R // (fold * 2) >= 32:
        fold *= 2
    rows = R // fold
    widest = max(1, COLUMNS // S)
    narrow = max(1, NARROW // S)
    parallel = size >= config.SERIAL_BYTES
    cached = BLOCK_BYTES // (rows * S * itemsize)  # channels of a unit that stay in the cache
    if fold > 1:
        parts, block = max(1, min(PARTS, -(-size // PART_BYTES), rows // 64)), C
    elif applied:
        parts, block = 1, min(C, widest)
    elif not parallel or cached >= min(C, narrow):
        parts, block = 1, min(C, widest, max(cached, narrow), max(narrow, -(-C // TASKS)) if parallel else C)
    else:
        parts, block = max(1, min(PARTS, size // PART_BYTES, rows // 64, 2**16 // (C * S))), min(C, widest)
    # channels whose columns are whole vectors: runs then begin on the boundaries of streaming stores
    step = lanes // math.gcd(S, lanes)
    if block < C and block >= step:
        block = block // step * step
    blocks = -(-C // block)
    # one more: past the cache, vectors begin on boundaries of the result
    columns = (-(-block * fold * S // lanes) + 1) * lanes
    # rows a page apart would share the sets of the first-level cache
    columns += lanes * (columns * itemsize % 4096 == 0)
    width = block * fold * S
    along = parts > 1 and size >= ALONG_BYTES and width > LINEAR
    # The backward reads two arrays, and rows of several panels worse than others: 8960 x 256 is 1.16 times as fast row
    # by row.
    back_along = parts > 1 and 2 * size >= (ALONG_BYTES // 2 if LINEAR < width <= PANELS else ALONG_BYTES)
    # Two at least: columns of a few hundred, all rows, share the sets of a core's cache (inference of 128 x 2048: 49 ->
    # 40 us).
    runs = max(1, min(-(-PARTS // blocks), max(2, size // PART_BYTES // blocks), rows // 32)) if parallel else 1
    return Columns(
        fold, R - fold * rows, parts, block, blocks, columns, WORK * columns, runs, along, back_along, parallel
    )


_ABSENT = {dtype: np.empty(0, dtype) for dtype in (dtypes.FLOAT32, dtypes.FLOAT64)}


class Route(NamedTuple):
    """How arrays of one canonical shape, dtype and memory order are walked together."""

    storage: dtypes.Dtype  # what the kernels see: half precision as its bits
    arithmetic: dtypes.Dtype  # what they compute in
    shape: Ints  # and in which shape: columns as (R, C * S)
    columns_per_channel: int  # S; 0 for the kernels on rows
    by_rows: Rows | None
    by_columns: Columns | None
    absent: Array  # what a parameter that is not there is to the kernels

    def view(self, array: Array) -> Array:
        """An array, which may have more axes than the canonical one, as the kernels see it."""
        if array.dtype is not self.storage:
            array = array.view(self.storage)
        return array if array.shape == self.shape else array.reshape(self.shape)


def route(dims: Ints, dtype: dtypes.Dtype, *strides: Ints, applied: bool = False) -> Route:
    """On columns where the kernels for that serve every array.

    Channels last, or short rows without gaps between them. `applied`: of a pass over elements alone.
    """
    storage = dtypes.HALF_STORAGE.get(dtype.name, dtype)
    arithmetic = dtypes.of_parameters(dtype)
    itemsize, absent = arithmetic.itemsize, _ABSENT[arithmetic]
    if len(dims) == 2:
        R, C = dims
        contiguous = all(s[0] == C * dtype.itemsize for s in strides)
        return Route(storage, arithmetic, dims, 1, None, of_columns(R, C, 1, itemsize, contiguous, applied), absent)
    N, C, S = dims
    if short(N, S, itemsize, applied) and (C == 1 or all(s[1] == S * dtype.itemsize for s in strides)):
        contiguous = all(s[0] == C * S * dtype.itemsize for s in strides)
        cut_columns = of_columns(N, C, S, itemsize, contiguous, applied)
        return Route(storage, arithmetic, (N, C * S), S, None, cut_columns, absent)
    return Route(storage, arithmetic, dims, 0, of_rows(N, C, S, itemsize), None, absent)


def fused(dims: Ints, dtype: dtypes.Dtype, out: Ints, *strides: Ints) -> Route | None:
    """The route of a call in one kernel, where a task's share stays in the cache between its two passes.

    Not where the last-level cache holds all arrays and they are not small: there two kernels in the order of memory are
    faster. The inputs alone decide how statistics are taken, so that they do not depend on where the result goes.
    """
    found = route(dims, dtype, *strides)
    if found.by_rows is not None:
        nbytes = (1 + len(strides)) * math.prod(dims) * dtype.itemsize
        return None if SWEEP_BYTES <= nbytes < config.STREAM_BYTES or found.by_rows.parts > 1 else found
    fits = found.by_columns is not None and found.by_columns.parts == 1 and found.by_columns.fold == 1
    return found if fits and route(dims, dtype, out).by_columns is not None else None


def streams(dims: Ints, dtype: dtypes.Dtype, arrays: int) -> bool:
    """Whether a result is written past the cache, in a call on so many arrays of its size."""
    return arrays * math.prod(dims) * dtype.itemsize >= config.STREAM_BYTES


def tasks(units: int, parallel: bool) -> int:
    """How many tasks share so many units of work: a few for each thread."""
    return min(units, 4 * threads.get_num_threads()) if parallel else 1


def group_of_statistics(by_rows: Rows, C: int) -> int:
    """Channels that statistics alone take together: as many as leave work for every task.

    One where its rows are long.
    """
    if by_rows.splits > 1:
        return 1
    return max(1, C * by_rows.parts // (4 * threads.get_num_threads())) if by_rows.parallel else C


def folded(by_columns: Columns, array: Array) -> tuple[Array, Array]:
    """(rows folded, the rows left over as one row) of an (R, F) array."""
    if by_columns.fold == 1:
        return array, array
    whole = array.shape[0] - by_columns.rest
    return array[:whole].reshape(-1, by_columns.fold * array.shape[1]), array[whole:].reshape(1, -1)
