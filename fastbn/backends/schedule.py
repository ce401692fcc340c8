"""How an array is cut into blocks, parts and groups: pure functions of the shape, so that any number of threads gives the same bits."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fastbn import config

BLOCK = 256  # vectors of 64 bytes: half a first-level cache, read twice from there
SLAB_BYTES = 4 * 2**20  # what a task may hold in its cache between two passes
PART_BYTES = 256 * 1024  # a task worth scheduling
RUN_BYTES = 8 * 1024  # channels side by side that are written as one run, where a row alone is too short for a prefetcher
PARTS = 64  # enough tasks for the cores of any machine that numba drives well
TASKS = 16


class First(NamedTuple):
    """Schedule of an (N, C, S) array: see `fastbn.kernels.channels_first`."""

    rows: int  # of a block, where a block is whole rows
    splits: int  # blocks of a row, where a row is several
    blocks: int  # of a channel
    parts: int  # of a channel; 1 where a channel stays in the cache: the fused kernels
    groups: int  # of the channels: those of a group are written row by row together
    parallel: bool
    stream: bool


class Last(NamedTuple):
    """Schedule of an (R, C) array: see `fastbn.kernels.channels_last`."""

    fold: int  # rows of the array in a row of the kernel
    rest: int  # rows left over
    parts: int  # of the rows; 1 where a group stays in the cache: the fused kernels
    groups: int  # of the columns
    width: int  # of a workspace: the columns rounded up to whole vectors
    parallel: bool
    stream: bool


@lru_cache(maxsize=1024)
def first(N: int, C: int, S: int, itemsize: int) -> First:
    """The schedule of (N, C, S)."""
    slab = N * S * itemsize
    vectors = -(-S * itemsize // 64)  # of a row
    rows, splits = (1, -(-vectors // BLOCK)) if vectors > BLOCK else (min(N, BLOCK // vectors), 1)
    blocks = N * splits if splits > 1 else -(-N // rows)
    parallel = slab * C >= config.SERIAL_BYTES
    fused = not parallel or (slab <= SLAB_BYTES and (C >= TASKS or slab <= PART_BYTES))
    parts = 1 if fused else min(PARTS, blocks, max(1, slab // PART_BYTES))
    size = max(1, min(RUN_BYTES // (S * itemsize), PART_BYTES // slab, C // TASKS)) if fused else 1
    return First(rows, splits, blocks, parts, -(-C // size), parallel and C * parts > 1, slab * C >= config.STREAM_BYTES)


@lru_cache(maxsize=1024)
def last(R: int, C: int, itemsize: int, contiguous: bool) -> Last:
    """The schedule of (R, C); only rows without gaps can be folded."""
    lanes = 64 // itemsize
    panel = 4 * lanes
    size = R * C * itemsize
    fold = panel // C if contiguous and 2 * C <= panel and R >= panel * 8 else 1
    rows, F = R // fold, fold * C
    width = -(-F // lanes) * lanes
    panels = -(-F // panel)
    parallel = size >= config.SERIAL_BYTES
    stream = size >= config.STREAM_BYTES
    if fold == 1 and (not parallel or (rows * panel * itemsize <= SLAB_BYTES // 8 and panels >= TASKS)):
        groups = min(panels, max(1, size // (PART_BYTES // 2))) if parallel else 1
        return Last(1, 0, 1, groups, width, parallel, stream)
    parts = max(1, min(PARTS, size // PART_BYTES, rows // 64, 2**16 // F))
    groups = min(panels, -(-TASKS // parts))
    return Last(fold, R - fold * rows, parts, groups, width, parallel, stream)
