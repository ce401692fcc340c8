"""How an array is cut into blocks and threads of a GPU: pure functions of shape, strides and alignment, in elements.

Which values are merged in which order does not depend on the device: the same input gives the same bits on every run.
Sizes below are of an H100 or H200, 132 multiprocessors of 2048 threads; they were chosen on paper and are to be
measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

THREADS = 256
WARP = 32
EACH = 4  # groups of a thread in the elementwise passes
ONE, TWO, TABLE = 0, 1, 2  # channels of a group there: see `fastbn.cuda.kernels.apply`
FULL = 264  # blocks that keep a device busy
ENOUGH = 132  # blocks, one to a multiprocessor, that are better than twice as many and a second reading from memory
WAVE = 528  # blocks that are on a device at once, four to a multiprocessor
BLOCKS = 2048  # blocks beyond which more only leave more to merge
DEEP = 8  # groups of a thread below which a part is not worth a block
SECTOR = 4  # numbers of float64 that memory moves at least
SLAB = 2**17  # bytes of a channel up to which a block finds them in cache at the second reading
SMALL = 2**16  # values of an array for which one launch counts more than short rows
EXACT = 2**24  # values that a float32 counts
SHORT = 64  # values of a row of channels first, up to which rows are treated as columns
TABLES = 2**16  # columns of a table of coefficients, 1 MiB of float32, up to which one may be longer than the array
LONG = 2**31  # values from which positions take 64 bits


MOST = 2**31 - 8  # channels: a grid has no more blocks, and tables of coefficients are padded to eights


class Rows(NamedTuple):
    """Grid of the kernels of `fastbn.cuda.kernels.rows` on (N, C, S)."""

    slots: int  # of 16 bytes in a row
    rest: int  # elements of a row outside them
    step_n: int  # rows and slots that a block goes on at once
    step_v: int
    parts: int  # of a channel
    chunk: int  # slots of a part
    chunk_rest: int  # elements outside slots of a part

    def blocks(self, C: int) -> int:
        """Blocks of C channels."""
        return C * self.parts


class Columns(NamedTuple):
    """Grid of the kernels of `fastbn.cuda.kernels.columns` on (R, W)."""

    fold: int  # rows of the array in one of the kernel
    R: int
    W: int
    rest: int  # columns of one more row
    across: int  # threads side by side, whose groups hold whole channels
    units: int  # blocks side by side
    parts: int  # of the rows
    chunk: int  # rows of a part
    copies: int  # of each channel that a part leaves: one where a block has all of a row

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return self.units * self.parts


class Runs(NamedTuple):
    """Grid of the kernels of `fastbn.cuda.kernels.apply`: runs of contiguous memory."""

    runs: int
    length: int  # of a run
    per_run: int  # channels of a run
    inner: int  # runs of one step of the outer stride
    groups: int  # of a run
    mode: int  # ONE, TWO or TABLE: how a group finds its coefficients
    C: int  # channels, and columns of each, as a group finds them; of a table, 1 and its columns
    S: int
    columns: int  # places of a channel in the table of coefficients, side by side
    copies: int  # of all channels there
    apart: int  # groups between one of a thread's and the next
    steps: tuple[int, ...]  # elements between them, of each array; 0 where the next is no such step further

    def blocks(self, threads: int) -> int:
        """Blocks of so many threads."""
        return -(-(-(-self.runs * self.groups // (EACH * self.apart)) * self.apart) // threads)


def blocks(count: int) -> int:
    """Blocks of a kernel with a thread to each of so many."""
    return -(-count // THREADS)


def parts_of(units: int, groups: int, values: int) -> int:
    """Parts of each of `units` pieces of work, of so many groups and values each."""
    parts = max(1, min(groups // (DEEP * THREADS), -(-BLOCKS // units)))
    if units * parts < FULL and groups >= DEEP * THREADS:  # fewer groups a thread rather than idle multiprocessors
        parts = max(parts, min(groups // (2 * THREADS), -(-FULL // units)))
    return max(parts, -(-values // EXACT))


def check_channels(C: int) -> None:
    """Raise ValueError for more channels than kernels count in 32 bits."""
    if C > MOST:
        raise ValueError(f"x: given {C} channels, want at most {MOST} on a GPU: pass it in slices of channels")


def even_rows(base: int, steps: Sequence[int], lanes: int) -> bool:
    """Whether every row begins on a 16-byte boundary; `base` elements lie between one and the first row."""
    return base % lanes == 0 and all(step % lanes == 0 for step in steps)


def rows(N: int, C: int, S: int, lanes: int, even: bool) -> Rows:
    """The grid of (N, C, S); `even` where every row begins on a 16-byte boundary."""
    slots = S // lanes if even else max(0, (S - lanes + 1) // lanes)
    rest = S - slots * lanes
    parts = parts_of(C, N * slots, N * S)
    chunk, chunk_rest = (-(-N * each // parts) for each in (slots, rest))
    return Rows(max(1, slots), rest, THREADS // max(1, slots), THREADS % max(1, slots), parts, chunk, chunk_rest)


def undivided(grid: Rows, N: int) -> Rows:
    """The same with one part, for N rows of each channel."""
    return grid._replace(parts=1, chunk=N * grid.slots if grid.chunk else 0, chunk_rest=N * grid.rest)


def _across(W: int, S: int, lanes: int) -> int:
    """Threads side by side for so many columns, S to a channel."""
    least = S // math.gcd(S, lanes)
    return min(least * max(1, WARP // least), -(-W // lanes))


def columns(R: int, C: int, S: int, lanes: int, contiguous: bool) -> Columns:
    """The grid of R rows of C * S columns; only rows without gaps can be folded."""
    width, fold = C * S, 1
    # which one launch takes, a channel to a column
    if contiguous and not (S == 1 and R * _across(C, 1, lanes) < DEEP * THREADS):
        whole = lanes // math.gcd(width, lanes)  # rows that are whole groups
        fold = whole * max(1, min(WARP * lanes // (whole * width), R // (16 * whole)))
        fold = 1 if R < 16 * fold else fold
    W, folded = fold * width, R // fold
    across = _across(W, S, lanes)
    units = -(-W // (across * lanes))
    groups = folded * across
    parts = max(1, min(groups // (DEEP * THREADS), WAVE // units))
    if units * parts < FULL and groups >= DEEP * THREADS:  # fewer groups a thread rather than idle multiprocessors
        parts = max(parts, min(groups // (2 * THREADS), -(-FULL // units)))
    parts = max(parts, -(-folded * min(across * lanes, W) // (C * EXACT)) if units == 1 else -(-folded * S // EXACT))
    chunk = -(-folded // parts)
    parts = -(-folded // chunk)  # no part without rows
    return Columns(fold, folded, W, R * width - folded * W, across, units, parts, chunk, fold if units > 1 else 1)


def finish(entries: int, C: int) -> int:
    """Channels of a block that merges so many partial results of each.

    As few as leave a thread to each, but what 32 bytes hold.
    """
    return min(max(SECTOR, THREADS >> (entries - 1).bit_length()), 1 << (C - 1).bit_length())


def _mode(per_run: int, S: int, lanes: int) -> int:
    """How groups of runs of so many channels of S elements find their coefficients."""
    return ONE if per_run == 1 or S % lanes == 0 else TWO if S > lanes else TABLE


def runs(N: int, C: int, S: int, lanes: int, steps: Sequence[tuple[int, int]]) -> Runs:
    """The runs of arrays (N, C, S) with these (outer, channel) strides each; channels last is S = 1."""
    if all(step == (C * S, S) for step in steps):
        runs, length, per_run, inner = 1, N * C * S, N * C, 1
    elif all(step[1] == S for step in steps):
        runs, length, per_run, inner = N, C * S, C, 1
    else:
        runs, length, per_run, inner = N * C, S, 1, C
    mode = _mode(per_run, S, lanes)
    image = math.lcm(C * S, lanes) if runs == 1 else C * S  # columns from which on all is as it was
    if mode == TABLE and image > max(TABLES, C * S) and (image * max(EACH, lanes) > length or image >= LONG):
        # rows wherever they begin, for the table would be longer than the array
        runs, length, per_run, image = N, C * S, C, C * S
        mode = _mode(per_run, S, lanes)
    groups = -(-length // lanes)
    found = (1, -(-image // lanes) * lanes, S, image // (C * S)) if mode == TABLE else (C, S, 1, 1)
    period = image // lanes if runs == 1 else groups * inner  # groups from which on all is as it was
    images = length // image if runs == 1 else N
    if images >= EACH:
        times = max(1, min(-(-THREADS // period), images // EACH))
        apart, further = times * period, tuple(times * (image if runs == 1 else outer) for outer, _ in steps)
    elif mode == ONE and S % (EACH * lanes) == 0:
        apart, further = S // (EACH * lanes), (S // EACH,) * len(steps)
    else:
        apart, further = THREADS, (0,) * len(steps)
    return Runs(runs, length, per_run, inner, groups, mode, *found, apart, further)
