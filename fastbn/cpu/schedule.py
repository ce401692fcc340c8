"""How an array is cut into blocks, parts and units.

Pure functions of the shape, so that any number of threads gives the same bits.
Sizes that decide the arithmetic are of the arithmetic's elements (`itemsize`: 4 for half precision too): a
half-precision array is cut as its float32 copy would be.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from fastbn.arguments import config
from fastbn.cpu.kernels.blocks import BLOCK, LINEAR, PANELS, WORK, cut

SLAB_BYTES = 4 * 2**20  # channels first: what a task may hold in its cache between two passes
# Channels first: what the fused kernels take together, up to 8 channels. Coefficients are computed for 8 at once, which
# shows where slabs are small; statistics then go along the memory, which forward gains from up to twice a core's own
# cache (32 x 512 x 28 x 28: 1.2 to 1.6 times as fast, 32 x 256 x 28 x 28: 1.2 to 1.4), and backward, which reads two
# arrays, does not (32 x 256 x 28 x 28: 0.85).
LOT_BYTES, BACK_BYTES = 2 * 2**20, 64 * 1024
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


class First(NamedTuple):
    """Schedule of an (N, C, S) array: see `fastbn.cpu.kernels.rows`."""

    rows: int  # of a block, where a block is whole rows
    splits: int  # blocks of a row, where a row is several
    blocks: int  # of a channel
    parts: int  # of a channel; 1 where a channel stays in the cache: the fused kernels
    pieces: int  # of a row, in the elementwise passes
    lot: int  # channels that the forward takes together
    ahead: int  # channels further, whose slabs are fetched meanwhile; 0 where the cache has no room for them
    back_lot: int  # the same of the backward
    back_ahead: int
    parallel: bool


class Last(NamedTuple):
    """Schedule of an (R, C * S) array: see `fastbn.cpu.kernels.columns`."""

    fold: int  # rows of the array in a row of the kernel
    rest: int  # rows left over
    parts: int  # of the rows; 1 where a block stays in the cache: the fused kernels
    block: int  # channels of a unit
    blocks: int
    columns: int  # of a workspace: a unit's in whole vectors, and one more
    work: int  # elements of a task's workspace
    runs: int  # of the rows, in the elementwise passes
    along: bool  # whether moments go row by row
    back_along: bool  # and sums of the backward
    parallel: bool


@lru_cache(maxsize=1024)
def first(N: int, C: int, S: int, itemsize: int) -> First:
    """The schedule of (N, C, S)."""
    slab = N * S * itemsize
    vectors = -(-S * itemsize // 64)  # of a row
    rows, splits, blocks = cut(N, S, 64 // itemsize, BLOCK)
    parallel = slab * C >= config.SERIAL_BYTES
    fused = not parallel or (slab <= SLAB_BYTES and (C >= TASKS or slab <= PART_BYTES))
    parts = 1 if fused else min(PARTS, blocks, max(1, slab // PART_BYTES))
    pieces = min(max(1, vectors // 64), -(-PARTS // (N * C)))
    most = max(1, min(8, C // TASKS if parallel else C))
    lot, back_lot = (max(1, min(most, limit // slab)) for limit in (LOT_BYTES, BACK_BYTES))
    ahead, back_ahead = (n if n * slab <= BLOCK_BYTES else 0 for n in (lot, back_lot))
    return First(rows, splits, blocks, parts, pieces, lot, ahead, back_lot, back_ahead, parallel)


def short(N: int, S: int, itemsize: int, applied: bool = False) -> bool:
    """Whether rows of channels first are better treated as columns; `applied`: in a pass over elements alone."""
    return S * itemsize <= (SHORT_BYTES // 16 if N < 4 else SHORT_APPLIED if applied else SHORT_BYTES)


@lru_cache(maxsize=1024)
def last(R: int, C: int, S: int, itemsize: int, contiguous: bool, applied: bool = False) -> Last:
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
    held = BLOCK_BYTES // (rows * S * itemsize)  # channels of a unit that stay in the cache
    if fold > 1:
        parts, block = max(1, min(PARTS, -(-size // PART_BYTES), rows // 64)), C
    elif applied:
        parts, block = 1, min(C, widest)
    elif not parallel or held >= min(C, narrow):
        parts, block = 1, min(C, widest, max(held, narrow), max(narrow, -(-C // TASKS)) if parallel else C)
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
    return Last(fold, R - fold * rows, parts, block, blocks, columns, WORK * columns, runs, along, back_along, parallel)
